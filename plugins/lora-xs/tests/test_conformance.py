from lora_lite.testing import VariantTests


class TestLoRAXS(VariantTests):
    variant = "lora_xs"
