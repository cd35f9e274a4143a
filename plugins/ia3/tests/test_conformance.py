from lora_lite.testing import VariantTests


class TestIA3(VariantTests):
    variant = "ia3"


class TestIA3FF(VariantTests):
    variant = "ia3_ff"
