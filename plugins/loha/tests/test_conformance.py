from lora_lite.testing import VariantTests


class TestLoHa(VariantTests):
    variant = "loha"
