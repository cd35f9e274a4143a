"""The conformance suite: every promise of the contract, held against one variant. Needs `lora-lite-core[testing]`.

from lora_lite.testing import VariantTests

class TestMyVariant(VariantTests): variant = "my_variant"

A kind of linear layer has a suite of its own, `LayerKindTests`.
"""

from lora_lite.testing.case import Case
from lora_lite.testing.layer_kind import LayerKindTests
from lora_lite.testing.promise import NewPromiseWarning, Promise, Subject
from lora_lite.testing.promises import PROMISES
from lora_lite.testing.suite import VariantTests

__all__ = ["PROMISES", "Case", "LayerKindTests", "NewPromiseWarning", "Promise", "Subject", "VariantTests"]
