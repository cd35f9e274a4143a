from lora_lite.testing import VariantTests


class TestAdaLoRA(VariantTests):
    variant = "adalora"
