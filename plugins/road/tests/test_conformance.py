from lora_lite.testing import VariantTests


class TestROAD(VariantTests):
    variant = "road"
