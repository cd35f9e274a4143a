from lora_lite.testing import VariantTests


class TestC3A(VariantTests):
    variant = "c3a"
