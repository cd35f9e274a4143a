from lora_lite.testing import VariantTests


class TestVBLoRA(VariantTests):
    variant = "vb_lora"
