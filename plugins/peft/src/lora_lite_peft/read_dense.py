"""Reading PEFT's LoHa, LoKr, OFT, MiSS, HiRA, C3A, SHiRA and FourierFT.

here                          PEFT
loha: A1, B1, A2, B2          hada_w1_b, hada_w1_a, hada_w2_b, hada_w2_a
lokr: W1, and A, B or W2      lokr_w1, and lokr_w2_b, lokr_w2_a or lokr_w2
oft: Q                        oft_R
miss: D                       miss_blockᵀ
hira: A, B                    hira_A, hira_B
c3a: w                        c3a_kernel
shira: v, places              shira_weight, shira_indices (row, column)
fourierft: c, frequencies     fourierft_spectrum; the frequencies from the config's seed
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lora_lite import AdapterFileError
from lora_lite.author import Base, ForeignAdapter, Variant
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from lora_lite_peft.config import Settings, read_settings
from lora_lite_peft.reading import Layers, Reader, layers_of, made, pattern, refuse_dropout


class RankedSettings(Settings):
    """What LoHa's and LoKr's configs share."""

    ignored: frozenset[str] = frozenset({"init_weights", "rank_dropout_scale"})

    r: PositiveInt = 8
    alpha: PositiveFloat = 8.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, PositiveFloat] = {}
    # Both say how tensors are made, which the tensors tell.
    decompose_both: bool = False
    decompose_factor: int = -1

    def fields(self, folder: Path, path: str) -> dict[str, Any]:
        """R and alpha of a layer."""
        refuse_dropout(folder, rank_dropout=self.rank_dropout, module_dropout=self.module_dropout)
        return {
            "r": pattern(self.rank_pattern, path, self.r),
            "alpha": pattern(self.alpha_pattern, path, self.alpha),
        }


class OFTSettings(Settings):
    """PEFT's OFTConfig. The sizes of the blocks, the tensors tell."""

    ignored: frozenset[str] = frozenset(
        {"eps", "fan_in_fan_out", "init_weights", "num_cayley_neumann_terms", "oft_block_size", "r"}
    )

    bias: Literal["none", "all", "oft_only"] = "none"
    module_dropout: float = 0.0
    use_cayley_neumann: bool = True


class MissSettings(Settings):
    """PEFT's MissConfig. Its other starts, "bat" and "mini", are other formulas."""

    ignored: frozenset[str] = frozenset({"mini_r", "r"})

    bias: Literal["none", "all", "MiSS_only"] = "none"
    init_weights: bool = True
    miss_dropout: float = 0.0


class HiraSettings(Settings):
    """PEFT's HiraConfig."""

    ignored: frozenset[str] = frozenset({"fan_in_fan_out", "init_weights", "r", "rank_pattern"})

    hira_dropout: float = 0.0


class C3ASettings(Settings):
    """PEFT's C3AConfig."""

    ignored: frozenset[str] = frozenset({"block_size", "block_size_pattern", "init_weights"})

    bias: Literal["none", "all", "c3a_only"] = "none"


class ShiraSettings(Settings):
    """PEFT's ShiraConfig."""

    ignored: frozenset[str] = frozenset(
        {"fan_in_fan_out", "init_weights", "mask_type", "random_seed"}
    )

    r: PositiveInt = 32


class FourierSettings(Settings):
    """PEFT's FourierFTConfig."""

    ignored: frozenset[str] = frozenset(
        {"fan_in_fan_out", "init_weights", "n_frequency", "n_frequency_pattern"}
    )

    bias: Literal["none", "all", "fourier_only"] = "none"
    scaling: PositiveFloat = 150.0
    random_loc_seed: NonNegativeInt = 777


def read_loha(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> ForeignAdapter:
    settings = read_settings(RankedSettings, folder, config)
    parts = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    variants: dict[str, Variant] = {}
    found: Layers = {}
    for path, given in layers_of(folder, tensors, base, parts).items():
        variants[path] = made(folder, path, "loha", settings.fields(folder, path))
        b1, a1, b2, a2 = (given[part] for part in parts)
        found[path] = {"A1": a1, "B1": b1, "A2": a2, "B2": b2}
    return ForeignAdapter(variants, found)


def read_lokr(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> ForeignAdapter:
    settings = read_settings(RankedSettings, folder, config)
    parts = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    layers = layers_of(folder, tensors, base, parts, needed=())
    sites = base.sites(layers)
    variants: dict[str, Variant] = {}
    found: Layers = {}
    for path, given in layers.items():
        found[path] = own = _kronecker_factors(folder, path, given)
        fields = {**settings.fields(folder, path), "factor": max(own["W1"].shape)}
        variants[path] = variant = made(folder, path, "lokr", fields)
        shapes = {name: spec.shape for name, spec in variant.tensors(sites[path]).items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in own.items()}:
            raise AdapterFileError(
                f"{folder}: {path} has {_shapes(given)}",
                expected=f"lokr here divides this layer into {shapes}",
                path=str(folder),
            )
    return ForeignAdapter(variants, found)


def _kronecker_factors(folder: Path, path: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """W1, multiplied out if PEFT has it as two factors; and W2, or its two factors."""
    own: dict[str, Tensor] = {}
    match sorted(name.removeprefix("lokr_") for name in given):
        case ["w1", *_]:
            own["W1"] = given["lokr_w1"]
        case ["w1_a", "w1_b", *_]:
            own["W1"] = given["lokr_w1_a"] @ given["lokr_w1_b"]
    if "lokr_w2" in given:
        own["W2"] = given["lokr_w2"]
    elif {"lokr_w2_a", "lokr_w2_b"} <= given.keys():
        own |= {"A": given["lokr_w2_b"], "B": given["lokr_w2_a"]}
    if "W1" not in own or len(own) == 1:
        raise AdapterFileError(
            f"{folder}: {path} has {_shapes(given)} and lacks others", path=str(folder)
        )
    return own


def read_oft(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> ForeignAdapter:
    settings = read_settings(OFTSettings, folder, config)  # coft and block_share are refused there
    refuse_dropout(folder, module_dropout=settings.module_dropout)
    if settings.use_cayley_neumann:
        raise AdapterFileError(
            f"{folder} has use_cayley_neumann=True, a series in place of the Cayley transform",
            expected="Its matrices are not quite orthogonal, and those of oft here are",
            fix="Set it to false in the config to have the exact transform of the same angles: "
            "the outputs differ where these are large",
            path=str(folder),
        )
    variants: dict[str, Variant] = {}
    found: Layers = {}
    for path, parts in layers_of(folder, tensors, base, ("oft_R.weight",)).items():
        q = parts["oft_R.weight"]
        block_size = (1 + math.isqrt(1 + 8 * q.shape[-1])) // 2
        variants[path] = made(folder, path, "oft", {"block_size": block_size})
        found[path] = {"Q": q}
    return ForeignAdapter(variants, found)


def read_miss(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> ForeignAdapter:
    settings = read_settings(MissSettings, folder, config)
    refuse_dropout(folder, miss_dropout=settings.miss_dropout)
    blocks = _single(folder, tensors, base, "miss_block")
    return ForeignAdapter(
        {path: made(folder, path, "miss", {"r": len(block)}) for path, block in blocks.items()},
        {path: {"D": block.T} for path, block in blocks.items()},
    )


def read_hira(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> ForeignAdapter:
    settings = read_settings(HiraSettings, folder, config)
    refuse_dropout(folder, hira_dropout=settings.hira_dropout)
    layers = layers_of(folder, tensors, base, ("hira_A", "hira_B"))
    return ForeignAdapter(
        {p: made(folder, p, "hira", {"r": len(parts["hira_A"])}) for p, parts in layers.items()},
        {p: {"A": parts["hira_A"], "B": parts["hira_B"]} for p, parts in layers.items()},
    )


def read_c3a(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> ForeignAdapter:
    read_settings(C3ASettings, folder, config)
    kernels = _single(folder, tensors, base, "c3a_kernel")
    return ForeignAdapter(
        {p: made(folder, p, "c3a", {"block_size": w.shape[-1]}) for p, w in kernels.items()},
        {p: {"w": w} for p, w in kernels.items()},
    )


def read_shira(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> ForeignAdapter:
    settings = read_settings(ShiraSettings, folder, config)
    layers = layers_of(folder, tensors, base, ("shira_weight", "shira_indices"))
    sites = base.sites(layers)
    variants: dict[str, Variant] = {}
    found: Layers = {}
    for path, parts in layers.items():
        variants[path] = made(folder, path, "shira", {"r": settings.r})
        rows, columns = parts["shira_indices"].long()
        places = rows * sites[path].d_in + columns
        found[path] = {"v": parts["shira_weight"], "places": places}
        _refuse_outside(folder, path, places, rows, columns, sites[path])
    return ForeignAdapter(variants, found)


def _refuse_outside(
    folder: Path, path: str, places: Tensor, rows: Tensor, columns: Tensor, site: Any
) -> None:
    """An error for places that the layer does not have, or that are there twice."""
    inside = (rows >= 0) & (rows < site.d_out) & (columns >= 0) & (columns < site.d_in)
    if not bool(inside.all()) or len(set(places.tolist())) != len(places):
        raise AdapterFileError(
            f"{folder}: {path} has shira_indices outside of {site.d_out} x {site.d_in}, or twice",
            path=str(folder),
            tensors=(f"{path}.shira_indices",),
        )


def read_fourierft(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base
) -> ForeignAdapter:
    settings = read_settings(FourierSettings, folder, config)
    spectra = _single(folder, tensors, base, "fourierft_spectrum")
    sites = base.sites(spectra)
    variants: dict[str, Variant] = {}
    found: Layers = {}
    for path, spectrum in spectra.items():
        fields = {"n": len(spectrum), "alpha": settings.scaling}
        variants[path] = made(folder, path, "fourierft", fields)
        rng = torch.Generator().manual_seed(settings.random_loc_seed)
        shuffled = torch.randperm(sites[path].d_out * sites[path].d_in, generator=rng)
        found[path] = {"c": spectrum, "frequencies": shuffled[: len(spectrum)]}
    return ForeignAdapter(variants, found)


READERS: dict[str, Reader] = {
    "LOHA": read_loha,
    "LOKR": read_lokr,
    "OFT": read_oft,
    "MISS": read_miss,
    "HIRA": read_hira,
    "C3A": read_c3a,
    "SHIRA": read_shira,
    "FOURIERFT": read_fourierft,
}


def _single(
    folder: Path, tensors: Mapping[str, Tensor], base: Base, part: str
) -> dict[str, Tensor]:
    """The tensor of each layer, of a method that has one."""
    layers = layers_of(folder, tensors, base, (part,))
    return {path: parts[part] for path, parts in layers.items()}


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
