"""What the author of a variant or of a layer kind needs, in one namespace.

from lora_lite.author import Rng, Site, Tensors, TensorSpec, Variant
"""

from lora_lite.errors import CalibrationError, LayerKindError, SiteError
from lora_lite.fields import DropoutRate, Finite, NonNegativeFinite, PositiveFinite
from lora_lite.layers import LayerKind
from lora_lite.linalg import check_rank, row_signs, top_r_svd
from lora_lite.lora_form import lora_scale, uniform_start
from lora_lite.variant import Observer, Rng, ScaledVariant, Site, Tensors, TensorSpec, Variant

__all__ = [
    "CalibrationError",
    "DropoutRate",
    "Finite",
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
    "check_rank",
    "lora_scale",
    "row_signs",
    "top_r_svd",
    "uniform_start",
]
