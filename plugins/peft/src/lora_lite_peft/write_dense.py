"""LoHa, LoKr, OFT, MiSS, HiRA, C3A and SHiRA as PEFT's own types.

`read_dense` has the table of what their tensors are. FourierFT is not here: PEFT draws its
frequencies again from a seed, and an adapter of ours has frequencies of its own.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lora_lite import AdapterError
from lora_lite.author import Base
from torch import Tensor

from lora_lite_peft.config import common
from lora_lite_peft.files import PREFIX, Folder
from lora_lite_peft.parts import Part
from lora_lite_peft.types import Writer, exactly, one_of_each, refuse_scaled

HADAMARD = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
KRONECKER = {"W1": "lokr_w1", "W2": "lokr_w2", "B": "lokr_w2_a", "A": "lokr_w2_b"}


def _loha(adapter: Part, base: Base) -> Folder:
    return _folder(adapter, base, "LOHA", _ranked(adapter), HADAMARD)


def _lokr(adapter: Part, base: Base) -> Folder:
    state = adapter.state_dict()
    factor = _decompose_factor(adapter, {p: state[f"{p}.W1"] for p in adapter.sites}, base)
    config = {**_ranked(adapter), "decompose_factor": factor, "decompose_both": False}
    return _folder(adapter, base, "LOKR", config, KRONECKER)


def _oft(adapter: Part, base: Base) -> Folder:
    state = adapter.state_dict()
    sizes = {base.sites([p])[p].d_in // len(state[f"{p}.Q"]) for p in adapter.sites}
    if len(sizes) > 1:
        raise AdapterError(
            f"the layers have blocks of several sizes: {', '.join(map(str, sorted(sizes)))}",
            expected="PEFT's OFT has one oft_block_size for all layers",
            fix="Leave native=True out, and write format='merged'",
            adapter=adapter.name,
        )
    config = {"r": 0, "oft_block_size": sizes.pop(), "use_cayley_neumann": False, "bias": "none"}
    return _folder(adapter, base, "OFT", config, {"Q": "oft_R.weight"})


def _miss(adapter: Part, base: Base) -> Folder:
    config = {"r": one_of_each(adapter, "r"), "init_weights": True, "bias": "none"}
    folder = _folder(adapter, base, "MISS", config, {"D": "miss_block"})
    return Folder(folder.config, {name: tensor.T for name, tensor in folder.tensors.items()})


def _hira(adapter: Part, base: Base) -> Folder:
    config = {"r": one_of_each(adapter, "r")}  # PEFT passes over its own rank_pattern here
    return _folder(adapter, base, "HIRA", config, {"A": "hira_A", "B": "hira_B"})


def _c3a(adapter: Part, base: Base) -> Folder:
    state = adapter.state_dict()
    sizes = {path: state[f"{path}.w"].shape[-1] for path in adapter.sites}
    size, others = _most(sizes, _below)
    config = {"block_size": size, "block_size_pattern": others, "bias": "none"}
    return _folder(adapter, base, "C3A", config, {"w": "c3a_kernel"})


def _shira(adapter: Part, base: Base) -> Folder:
    config = {"r": one_of_each(adapter, "r"), "mask_type": "random", "random_seed": None}
    folder = _folder(adapter, base, "SHIRA", config, {"v": "shira_weight"})
    tensors = dict(folder.tensors)
    for path, site in base.sites(adapter.sites).items():
        places = adapter.state_dict()[f"{path}.places"]
        rows_columns = torch.stack([places // site.d_in, places % site.d_in])
        tensors[f"{PREFIX}{path}.shira_indices"] = rows_columns.int()
    return Folder(folder.config, tensors)


WRITERS: dict[tuple[str, ...], Writer] = {
    ("loha",): _loha,
    ("lokr",): _lokr,
    ("oft",): _oft,
    ("miss",): _miss,
    ("hira",): _hira,
    ("c3a",): _c3a,
    ("shira",): _shira,
}


def _folder(
    adapter: Part, base: Base, kind: str, config: Mapping[str, Any], names: Mapping[str, str]
) -> Folder:
    """A folder whose tensors are ours under PEFT's names."""
    refuse_scaled(adapter)
    state = adapter.state_dict()
    tensors: dict[str, Tensor] = {}
    for path in adapter.sites:
        for ours, theirs in names.items():
            if f"{path}.{ours}" in state:
                tensors[f"{PREFIX}{path}.{theirs}"] = state[f"{path}.{ours}"]
    return Folder({**common(base, list(adapter.sites)), "peft_type": kind, **config}, tensors)


def _ranked(adapter: Part) -> dict[str, Any]:
    """R and alpha, and patterns for the layers that have others."""
    fields = _fields(adapter)
    r, ranks = _most({path: each.r for path, each in fields.items()}, exactly)
    alpha, alphas = _most({path: each.alpha for path, each in fields.items()}, exactly)
    return {"r": r, "rank_pattern": ranks, "alpha": alpha, "alpha_pattern": alphas}


def _fields(adapter: Part) -> dict[str, Any]:
    return dict(adapter.sites)


def _most(values: Mapping[str, Any], pattern: Callable[[str], str]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value, and those of the layers that have others, by a pattern for each."""
    most = Counter(values.values()).most_common(1)[0][0]
    return most, {pattern(path): value for path, value in values.items() if value != most}


def _below(path: str) -> str:
    """A pattern for one path, for types in which PEFT looks for it after a dot."""
    return re.escape(path.partition(".")[2] or path)


def _decompose_factor(adapter: Part, small: Mapping[str, Tensor], base: Base) -> int:
    """The decompose_factor with which PEFT divides every layer as ours are divided."""
    shapes = {path: tuple(tensor.shape) for path, tensor in small.items()}
    sites = base.sites(shapes)
    candidates = [-1, *sorted({size for shape in shapes.values() for size in shape})]
    for factor in candidates:
        if all(
            (_theirs(sites[p].d_out, factor), _theirs(sites[p].d_in, factor)) == shape
            for p, shape in shapes.items()
        ):
            return factor
    raise AdapterError(
        "PEFT would divide some of these layers otherwise than they are divided here",
        expected="It has one decompose_factor for all of them",
        fix="Leave native=True out, and write format='merged'",
        adapter=adapter.name,
    )


def _theirs(size: int, factor: int) -> int:
    """How many rows or columns PEFT gives to W1."""
    if factor > 0 and size % factor == 0:
        return factor
    divisors = [n for n in range(1, int(size**0.5) + 1) if size % n == 0]
    return max(n for n in divisors if factor < 0 or n <= factor)
