"""Small stand-ins for large tensors: samples of the base weights, and probes of derived tensors.

A fingerprint tells whether a base is the one that an adapter was made on. Sampled weights are
compared after rounding to bfloat16, so that the float32, bfloat16 and (nearly always) float16
copies of one model are the same base; a quantised or a fine-tuned copy is another.

A probe aᵀ T b with random a and b tells whether a tensor that was left out of a file came out the
same when it was derived again. One flipped column is seen; rounding between thread counts is not.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from lora_lite.layers import whole
from lora_lite.site import Site

SAMPLES = 1024
MOST_PER_SITE = 64
FEWEST_PER_SITE = 4
BYTES_PER_SAMPLE = 2
PROBES = 8
# A site counts as changed if more than one in eight samples, and more than one, differ.
TOLERATED = 8
# Of a probe, relative to the root mean square of the columns' norms; a flipped column moves it by
# 2.
PROBE_TOLERANCE = 1e-2


# --- the base


def fingerprint(sites: Iterable[Site]) -> dict[str, bytes]:
    """Samples of every site, about `SAMPLES` in all."""
    sites = list(sites)
    count = SAMPLES // max(1, len(sites))
    count = min(MOST_PER_SITE, max(FEWEST_PER_SITE, count))
    return samples({site.path: site for site in sites}, count)


def changed(recorded: Mapping[str, bytes], sites: Mapping[str, Site]) -> list[str]:
    """The paths of the sites whose weights are not those of the recorded fingerprint."""
    counts = {len(before) // BYTES_PER_SAMPLE for before in recorded.values()}
    now: dict[str, bytes] = {}
    for count in counts:
        same_count = {
            path: site
            for path, site in sites.items()
            if len(recorded.get(path, b"")) // BYTES_PER_SAMPLE == count
        }
        now.update(samples(same_count, count))
    return [path for path, after in now.items() if _differs(recorded[path], after)]


def samples(sites: Mapping[str, Site], count: int) -> dict[str, bytes]:
    """`count` weights of each site at fixed random places, rounded to bfloat16."""
    values = []
    for site in sites.values():
        weight = whole(site.weight())
        rows, columns = _places(*weight.shape, count)
        if weight.device.type != "cpu":
            rows, columns = rows.to(weight.device), columns.to(weight.device)
        values.append(weight[rows, columns].float().cpu())
    if not values:
        return {}
    rounded = torch.stack(values).bfloat16().view(torch.uint8).tolist()
    return {path: bytes(row) for path, row in zip(sites, rounded, strict=True)}


@lru_cache(maxsize=256)
def _places(d_out: int, d_in: int, count: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the sampled weights."""
    places = torch.randint(d_in * d_out, (count,), generator=torch.Generator().manual_seed(0))
    return places // d_in, places % d_in


def _differs(before: bytes, after: bytes) -> bool:
    count = len(before) // BYTES_PER_SAMPLE
    pairs = (slice(start, start + BYTES_PER_SAMPLE) for start in range(0, len(before), 2))
    misses = sum(before[pair] != after[pair] for pair in pairs)
    return misses > max(1, count // TOLERATED)


# --- derived tensors


def probe(tensor: Tensor) -> list[float]:
    """Eight numbers aᵀ T b; T is seen as a matrix (its last dimension against the rest)."""
    matrix = _matrix(tensor)
    rng = torch.Generator().manual_seed(0)
    left = torch.randn(PROBES, matrix.shape[0], generator=rng, dtype=torch.float64)
    right = torch.randn(matrix.shape[1], PROBES, generator=rng, dtype=torch.float64)
    return [float(number) for number in ((left @ matrix) * right.T).sum(1)]


def probe_agrees(tensor: Tensor, recorded: list[float]) -> bool:
    """Whether a derived tensor is the recorded one.

    Up to rounding, and what rounding makes of directions whose singular values are nearly equal.
    """
    matrix = _matrix(tensor)
    allowed = PROBE_TOLERANCE * float(matrix.norm()) / matrix.shape[1] ** 0.5
    return all(abs(a - b) <= allowed for a, b in zip(probe(tensor), recorded, strict=True))


def _matrix(tensor: Tensor) -> Tensor:
    """A tensor as a matrix in float64 on the CPU; a vector is one column."""
    double = tensor.detach().double().cpu()
    return double.reshape(-1, 1) if double.ndim == 1 else double.reshape(-1, double.shape[-1])
