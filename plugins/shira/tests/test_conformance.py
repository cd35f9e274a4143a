from lora_lite.testing import VariantTests


class TestSHiRA(VariantTests):
    variant = "shira"
