from hypothesis import strategies as st
from lora_lite.testing import VariantTests


class TestFull(VariantTests):
    variant = "full"


class TestTokens(VariantTests):
    variant = "tokens"
    fields = {"ids": st.sampled_from([(), (0,), (0, 1)])}
