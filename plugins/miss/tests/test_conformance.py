from lora_lite.testing import VariantTests


class TestMiSS(VariantTests):
    variant = "miss"
