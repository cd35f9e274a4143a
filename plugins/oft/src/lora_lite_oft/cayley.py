"""The Cayley transform of skew matrices, which OFT and BOFT have in common."""

import torch
from torch import Tensor


def cayley_offset(entries: Tensor, b: int) -> Tensor:
    """R - I of R = (I - Q)(I + Q)⁻¹, as -2 Q (I + Q)⁻¹, so that nothing cancels where Q is small.

    Args:
        entries: those of the skew matrices Q above the diagonal, row by row, (..., b (b - 1) / 2).
        b: the size of the matrices.

    Returns:
        R - I, (..., b, b), in the dtype of `entries`.
    """
    row, column = torch.triu_indices(b, b, 1, device=entries.device)
    count = len(row)
    flat = entries.reshape(-1, count)
    upper = flat.new_zeros(len(flat), b * b).index_copy(1, row * b + column, flat)
    upper = upper.view(-1, b, b)
    q = upper - upper.mT
    identity = torch.eye(b, dtype=q.dtype, device=q.device)
    offset: Tensor = -2 * torch.linalg.solve(identity + q, q)
    return offset.view(*entries.shape[:-1], b, b)
