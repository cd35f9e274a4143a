from lora_lite.testing import VariantTests


class TestLoRA(VariantTests):
    variant = "lora"
