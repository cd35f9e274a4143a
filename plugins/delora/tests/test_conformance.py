from lora_lite.testing import VariantTests


class TestDeLoRA(VariantTests):
    variant = "delora"
