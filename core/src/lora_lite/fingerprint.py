"""Small stand-ins for large tensors: samples of the base weights, and probes of derived tensors.

A fingerprint tells whether a base is the one that an adapter was made on. Sampled weights are compared after rounding to
bfloat16, so the float32, bfloat16 and (nearly always) float16 copies of one model are the same base; a quantised or a
fine-tuned copy is another.

A probe aᵀ T b with random a, b tells whether a tensor that was left out of a file came out the same when it was derived
again; one flipped column is seen, rounding between thread counts is not.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from lora_lite.layers import whole
from lora_lite.variant import Site

SAMPLES = 1024
PROBES = 8
# A site counts as changed if more than one in eight samples, and more than one, differ.
TOLERATED = 8
# Of a probe, relative to the root mean square of the columns' norms: a flipped column moves it by about 2.
PROBE_TOLERANCE = 1e-2


def sample(site: Site, count: int) -> bytes:
    """`count` weights at fixed random places, rounded to bfloat16."""
    weight, rng = whole(site.weight()), torch.Generator().manual_seed(0)
    places = torch.randint(site.d_in * site.d_out, (count,), generator=rng).to(weight.device)
    values = weight[places // site.d_in, places % site.d_in]
    return bytes(values.float().cpu().bfloat16().view(torch.uint8).tolist())


def fingerprint(sites: Mapping[str, Site]) -> dict[str, bytes]:
    """Samples of every site, about `SAMPLES` in all, at least 4 and at most 64 a site."""
    count = min(64, max(4, SAMPLES // max(1, len(sites))))
    return {path: sample(site, count) for path, site in sites.items()}


def changed(recorded: Mapping[str, bytes], sites: Mapping[str, Site]) -> list[str]:
    """The sites whose weights are not those of the recorded fingerprint."""
    return [
        path for path, before in recorded.items() if path in sites and _differs(before, sites[path])
    ]


def _differs(before: bytes, site: Site) -> bool:
    count = len(before) // 2
    now = sample(site, count)
    misses = sum(before[2 * i : 2 * i + 2] != now[2 * i : 2 * i + 2] for i in range(count))
    return misses > max(1, count // TOLERATED)


def probe(tensor: Tensor) -> list[float]:
    """Eight numbers aᵀ T b; T is seen as a matrix (its last dimension against the rest), a vector as one column."""
    matrix = _matrix(tensor)
    rng = torch.Generator().manual_seed(0)
    left = torch.randn(PROBES, matrix.shape[0], generator=rng, dtype=torch.float64)
    right = torch.randn(matrix.shape[1], PROBES, generator=rng, dtype=torch.float64)
    return [float(number) for number in ((left @ matrix) * right.T).sum(1)]


def probe_agrees(tensor: Tensor, recorded: list[float]) -> bool:
    """Whether a derived tensor is the recorded one, up to rounding and what a near-degenerate spectrum makes of it."""
    matrix = _matrix(tensor)
    allowed = PROBE_TOLERANCE * float(matrix.norm()) / matrix.shape[1] ** 0.5
    return all(abs(a - b) <= allowed for a, b in zip(probe(tensor), recorded, strict=True))


def _matrix(tensor: Tensor) -> Tensor:
    double = tensor.detach().double().cpu()
    return double.reshape(-1, 1) if double.ndim == 1 else double.reshape(-1, double.shape[-1])
