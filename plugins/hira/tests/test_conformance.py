from lora_lite.testing import VariantTests


class TestHiRA(VariantTests):
    variant = "hira"
