from lora_lite.testing import VariantTests


class TestCorDA(VariantTests):
    variant = "corda"


class TestLoRAGA(VariantTests):
    variant = "lora_ga"


class TestMiLoRA(VariantTests):
    variant = "milora"


class TestOLoRA(VariantTests):
    variant = "olora"
