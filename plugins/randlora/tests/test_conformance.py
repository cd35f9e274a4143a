from lora_lite.testing import VariantTests


class TestRandLoRA(VariantTests):
    variant = "randlora"
