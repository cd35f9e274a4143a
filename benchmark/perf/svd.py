"""Top-r SVD at init: our randomised method against the full SVD, in one run. Time, and how well the
top-r space is met.

python benchmark/perf/svd.py

The matrix is 3584 x 1024 with singular values i^-1/2, a slow decay that randomised methods find
hard. The cosine is that of the largest principal angle between the found and the true space of r
directions, on either side.
"""

import time

import lora_lite as ll
import torch
from torch import Tensor


def spectrum(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix of known singular triplets."""
    rng = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(rows, columns, generator=rng)).Q
    v = torch.linalg.qr(torch.randn(columns, columns, generator=rng)).Q
    s = torch.arange(1, columns + 1).float() ** -0.5
    return u * s @ v, u, v.T


def worst_cosine(found: Tensor, true: Tensor) -> float:
    """Of the largest principal angle between two spaces given by orthonormal columns."""
    return float(torch.linalg.svdvals(found.double().T @ true.double()).min())


def main() -> None:
    w, u, v = spectrum(3584, 1024)
    print(f"{torch.get_num_threads()} threads")
    print("| r | full SVD s | randomised s | times faster | worst cosine |\n|---|---|---|---|---|")
    for r in (8, 32, 128):
        seconds = {}
        for method in ("exact", "randomized", "exact", "randomized", "exact", "randomized"):
            start = time.perf_counter()
            found = ll.top_r_svd(w, r, method)
            seconds[method] = min(seconds.get(method, 1e9), time.perf_counter() - start)
        cosine = min(worst_cosine(found[0], u[:, :r]), worst_cosine(found[2].T, v[:, :r]))
        exact, fast = seconds["exact"], seconds["randomized"]
        print(f"| {r} | {exact:.2f} | {fast:.3f} | {exact / fast:.1f} | {cosine:.6f} |", flush=True)


if __name__ == "__main__":
    main()
