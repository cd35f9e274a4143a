from lora_lite.testing import VariantTests


class TestLoKr(VariantTests):
    variant = "lokr"
