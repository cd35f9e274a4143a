from lora_lite.testing import VariantTests


class TestLoRA(VariantTests):
    variant = "lora"


class TestLoRABias(VariantTests):
    variant = "lora_bias"
