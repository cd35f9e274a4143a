"""The conformance suite over every installed variant: a plugin that is installed is a plugin that
is tested. Those of this repository are tested in their own folders, and not again here.
"""

from pathlib import Path

import lora_lite as ll
import pytest
from lora_lite.testing import VariantTests

PLUGINS = Path(__file__).parents[1] / "plugins"
OWN = {
    name: PLUGINS / variant.distribution.removeprefix("lora-lite-") / "tests/test_conformance.py"
    for name, variant in ll.variants().items()
}
TESTED_THERE = {
    name
    for name, file in OWN.items()
    if file.exists() and f'variant = "{name}"' in file.read_text()
}

for _name in ll.variants().keys() - TESTED_THERE:
    _class = f"Test_{_name}"
    globals()[_class] = type(_class, (VariantTests,), {"variant": _name, "__module__": __name__})


def test_there_are_variants_to_test() -> None:
    assert {"lora", "antipasto"} <= ll.variants().keys()


def test_every_variant_of_this_repository_is_tested_in_its_folder() -> None:
    """What is left for this file are variants of other repositories."""
    ours = {name for name, file in OWN.items() if file.parents[1].exists()}
    assert {"lora", "oft", "olora"} <= ours
    assert ours <= TESTED_THERE


def test_a_name_that_is_not_installed_fails() -> None:
    class Missing(VariantTests):
        variant = "no_such_variant"

    with pytest.raises(ll.UnknownVariantError):
        Missing().test_fields_survive_json()  # type: ignore[attr-defined]
