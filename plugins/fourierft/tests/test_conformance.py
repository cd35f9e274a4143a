from lora_lite.testing import VariantTests


class TestFourierFT(VariantTests):
    variant = "fourierft"
