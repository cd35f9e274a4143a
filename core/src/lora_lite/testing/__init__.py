"""The conformance suite: every promise of the contract, held against one variant.

Needs `lora-lite-core[testing]`.

from lora_lite.testing import VariantTests

class TestMyVariant(VariantTests):
    variant = "my_variant"

A kind of linear layer has a suite of its own, `LayerKindTests`. The suite is imported on first use:
`lora-lite new`, which lives here too, does without the extra.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_lite.testing.case import Case
    from lora_lite.testing.layer_kind import LayerKindTests
    from lora_lite.testing.promise import NewPromiseWarning, Promise, Subject
    from lora_lite.testing.promises import PROMISES
    from lora_lite.testing.suite import VariantTests

__all__ = [
    "PROMISES",
    "Case",
    "LayerKindTests",
    "NewPromiseWarning",
    "Promise",
    "Subject",
    "VariantTests",
]

MODULES = {
    "PROMISES": "promises",
    "Case": "case",
    "LayerKindTests": "layer_kind",
    "VariantTests": "suite",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES.get(name, 'promise')}"), name)
