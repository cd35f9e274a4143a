from lora_lite.testing import VariantTests


class TestVeRA(VariantTests):
    variant = "vera"
