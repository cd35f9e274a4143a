from hypothesis import strategies as st
from lora_lite.testing import VariantTests


class TestAntiPaSTO(VariantTests):
    variant = "antipasto"
    fields = {"r": st.sampled_from([4, 8]), "block_size": st.sampled_from([2, 4])}
