"""Tokens: train the rows of chosen tokens, in an embedding and in the head that shares its weight.

For the rows R (k, d) of the tokens `ids`, which are E₀ in the base:

    embedding    Δy = (R - E₀)[token]       for the tokens in ids, and 0 for all others
    head         Δy[ids] = (R - E₀) x       and 0 for all other logits

R is stored as it is, and not as its distance from E₀. So new tokens come back as they were trained,
although their rows are random again whenever a vocabulary is resized. A new adapter adds exactly 0.
"""

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

import torch
from lora_lite.author import Rng, Site, SiteError, Tensors, TensorSpec, Variant
from pydantic import BeforeValidator, NonNegativeInt
from torch import Tensor
from torch.nn.functional import embedding, linear


def _in_order(ids: Any) -> Any:
    """Any collection of ids as a sorted tuple, each of them once."""
    if isinstance(ids, Iterable) and not isinstance(ids, str | bytes):
        given = list(ids)
        if all(type(each) is int for each in given):
            return tuple(sorted(set(given)))
    return ids


class Tokens(Variant, name="tokens"):
    """New rows for chosen tokens of an embedding, or of an output head.

    Attributes:
        ids: of the tokens; () means all of them.
    """

    recommended_lr: ClassVar[float] = 1e-3
    replaces_weights: ClassVar[bool] = True

    ids: Annotated[tuple[NonNegativeInt, ...], BeforeValidator(_in_order)] = ()

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        if not site.has_matrix:
            raise SiteError("ids", "this module is neither an embedding nor a head")
        tokens, width = (site.d_in, site.d_out) if site.reads_ids else (site.d_out, site.d_in)
        if self.ids and self.ids[-1] >= tokens:
            raise SiteError("ids", f"{self.ids[-1]} is not one of the {tokens} tokens there")
        count = len(self.ids) or tokens
        return {
            # Weight decay would pull to 0, and not to the base.
            "rows": TensorSpec((count, width), decay=False, compute="float32"),
            "ids": TensorSpec((count,), trainable=False, dtype=torch.int64),
        }

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        table = _table(site)
        ids = torch.tensor(self.ids or range(len(table)), device=table.device)
        return {"rows": table[ids], "ids": ids}

    def prepare(self, site: Site, t: Tensors) -> dict[str, Tensor]:
        return {"change": t["rows"] - _table(site)[t["ids"]].to(t["rows"].dtype)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        change = t["change"].to(y.dtype)
        if not site.reads_ids:
            return torch.zeros_like(y).index_copy(-1, t["ids"], linear(x, change).to(y.dtype))
        tokens: Tensor | None = getattr(x, "ids", None)
        if tokens is None:  # merging asks what numbers for all tokens give
            return linear(x[..., t["ids"]], change.T)
        place = torch.searchsorted(t["ids"], tokens).clamp_max(len(t["ids"]) - 1)
        is_chosen = t["ids"][place] == tokens
        return embedding(place, change) * is_chosen[..., None]

    def macs_per_token(self, site: Site) -> int:
        return 0 if site.reads_ids else (len(self.ids) or site.d_out) * site.d_in


def _table(site: Site) -> Tensor:
    """One row for each token."""
    return site.weight().T if site.reads_ids else site.weight()
