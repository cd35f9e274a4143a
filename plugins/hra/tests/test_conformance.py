from lora_lite.testing import VariantTests


class TestHRA(VariantTests):
    variant = "hra"
