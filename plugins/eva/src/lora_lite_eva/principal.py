"""The principal directions of a layer's inputs, from one pass over calibration data.

It is an incremental singular value decomposition that follows more directions than are used. What
is known of earlier rows is K = diag(S) V (followed, d_in). With the next block of rows below it,
M = [K; block], the new K is the part of Uᵀ M with the largest singular values, U being the
eigenvectors of the small M Mᵀ. So memory for a site is K and one block of rows, whatever the number
of batches. The work is done in float64 on the CPU.

With a moving mean: Ross, Lim, Lin and Yang 2008, "Incremental Learning for Robust Visual Tracking".
"""

import math
from typing import NamedTuple

import torch
from lora_lite.author import row_signs
from torch import Tensor
from torch.nn.functional import normalize


class Components(NamedTuple):
    """What the observer found.

    Attributes:
        directions: (followed, d_in), rows of length 1, the largest first.
        singular_values: (followed,), of all rows, or of all rows less their mean.
        sum_of_squares: of all entries, or of all less the mean: the total of the squared values.
        norm: of all rows, the mean included.
        rows: how many there were.
    """

    directions: Tensor
    singular_values: Tensor
    sum_of_squares: Tensor
    norm: Tensor
    rows: Tensor


class PrincipalDirections:
    """The observer: the largest singular values and right singular vectors of all rows x.

    Args:
        followed: how many directions to follow.
        d_in: the length of x.
        center: whether of the rows less their mean.
    """

    def __init__(self, followed: int, d_in: int, center: bool) -> None:
        self.followed = followed
        self.center = center
        self.rows = 0
        self.mean = torch.zeros(d_in, dtype=torch.float64)
        self.known = torch.zeros(0, d_in, dtype=torch.float64)
        self.sum_of_squares = 0.0

    def update(self, x: Tensor, y: Tensor) -> None:
        for block in torch.split(x, max(256, self.followed)):
            if len(block):
                self._add(block.cpu().double())

    def result(self) -> dict[str, Tensor]:
        of_mean = self.rows * float(self.mean.square().sum())
        return Components(
            directions=row_signs(self.known) * normalize(self.known, dim=1),
            singular_values=self.known.norm(dim=1),
            sum_of_squares=torch.tensor(self.sum_of_squares),
            norm=torch.tensor(self.sum_of_squares + of_mean).sqrt(),
            rows=torch.tensor(self.rows),
        )._asdict()

    def _add(self, block: Tensor) -> None:
        """Take in one block. A mean that has moved counts as one more row."""
        before, now = self.rows, self.rows + len(block)
        if self.center:
            shift = block.mean(0) - self.mean
            self.mean = self.mean + len(block) / now * shift
            of_shift = math.sqrt(before * len(block) / now) * shift
            block = torch.cat([block - block.mean(0), of_shift[None]])
        stacked = torch.cat([self.known, block])
        u = torch.linalg.eigh(stacked @ stacked.T).eigenvectors.flip(1)
        self.known = u[:, : self.followed].T @ stacked
        self.sum_of_squares += float(block.square().sum())
        self.rows = now
