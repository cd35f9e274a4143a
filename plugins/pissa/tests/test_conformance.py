from lora_lite.testing import VariantTests


class TestPiSSA(VariantTests):
    variant = "pissa"
