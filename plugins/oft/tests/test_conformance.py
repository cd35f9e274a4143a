from lora_lite.testing import VariantTests


class TestOFT(VariantTests):
    variant = "oft"


class TestBOFT(VariantTests):
    variant = "boft"
