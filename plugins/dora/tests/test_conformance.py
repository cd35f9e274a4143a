from lora_lite.testing import VariantTests


class TestDoRA(VariantTests):
    variant = "dora"
