"""What the author of a variant, a layer kind or a format needs, in one namespace.

from lora_lite.author import Rng, Site, Tensors, TensorSpec, Variant
"""

from lora_lite.base import Base
from lora_lite.errors import (
    CalibrationError,
    LayerKindError,
    SiteError,
    VariantContractError,
    VariantDefinitionError,
)
from lora_lite.field_types import DropoutRate, Finite, NonNegativeFinite, PositiveFinite
from lora_lite.fields import make_variant
from lora_lite.formats import ForeignAdapter, Format
from lora_lite.layers import LayerKind
from lora_lite.linalg import check_rank, row_signs, top_r_svd
from lora_lite.lora_form import lora_scale, uniform_start
from lora_lite.site import Site
from lora_lite.tensor_spec import CLOCK, TensorSpec
from lora_lite.variant import GradientObserver, Observer, Rng, ScaledVariant, Tensors, Variant

__all__ = [
    "CLOCK",
    "Base",
    "CalibrationError",
    "DropoutRate",
    "Finite",
    "ForeignAdapter",
    "Format",
    "GradientObserver",
    "LayerKind",
    "LayerKindError",
    "NonNegativeFinite",
    "Observer",
    "PositiveFinite",
    "Rng",
    "ScaledVariant",
    "Site",
    "SiteError",
    "TensorSpec",
    "Tensors",
    "Variant",
    "VariantContractError",
    "VariantDefinitionError",
    "check_rank",
    "lora_scale",
    "make_variant",
    "row_signs",
    "top_r_svd",
    "uniform_start",
]
