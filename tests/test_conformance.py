"""The conformance suite over every installed variant: a plugin that is installed is a plugin that
is tested.
"""

import lora_lite as ll
import pytest
from hypothesis import strategies as st
from lora_lite.testing import VariantTests

# As in the plugin's own test: away from bounds at which noise or a step on a tiny layer is taken
# back by `project`.
FIELDS = {
    "antipasto_gain": {"r": st.sampled_from([8, 12])},
    "antipasto_ablate": {"r": st.sampled_from([4, 8]), "init_alpha": st.sampled_from([0.4, 0.8])},
}

for _name in ll.variants():
    _class = f"Test_{_name}"
    globals()[_class] = type(
        _class,
        (VariantTests,),
        {"variant": _name, "fields": FIELDS.get(_name, {}), "__module__": __name__},
    )


def test_there_are_variants_to_test() -> None:
    assert {"lora", "antipasto"} <= ll.variants().keys()


def test_a_name_that_is_not_installed_fails() -> None:
    class Missing(VariantTests):
        variant = "no_such_variant"

    with pytest.raises(ll.UnknownVariantError):
        Missing().test_fields_survive_json()  # type: ignore[attr-defined]
