from lora_lite.testing import VariantTests


class TestEVA(VariantTests):
    variant = "eva"
