"""A drawn situation, and the tiny model that it describes.

Everything follows from the case's own values, so another process builds the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from lora_lite.author import Site, Variant
from lora_lite.calibration import wants_gradients
from lora_lite.fields import validated

Kind = Literal["Linear", "Conv1D"]
KINDS: tuple[Kind, ...] = ("Linear", "Conv1D") if find_spec("transformers") else ("Linear",)

TARGETS = r"\.layer$"


# A layer that is larger than all that are drawn, and how many tokens go through it.
LARGE = {"wide": (96, 48), "tall": (48, 96), "square": (64, 64)}
LARGE_SIZES = (16, 12)
LARGE_TOKENS = 40
# A layer whose sizes are all odd: halves and pairs leave a rest.
ODD, ODD_SIZE = (9, 7), 3


@dataclass(frozen=True)
class Case:
    """A variant with its fields, and the layer it is put on.

    Attributes:
        variant: the instance.
        kind: of the layer.
        d_in, d_out, bias: its shape; a Conv1D always has a bias.
        dtype: of the base.
        seed: of the base's weights, the data and the adapter.
        tokens: how many go through the layer, where a promise looks at a sequence.
    """

    variant: Variant
    kind: Kind
    d_in: int
    d_out: int
    bias: bool
    dtype: torch.dtype
    seed: int
    tokens: int = 4

    def but(self, **changes: Any) -> Case:
        """The case with other values."""
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        bias = "with bias" if self.bias else "without bias"
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"{self.kind} {self.d_in} -> {self.d_out}"
        return f"Case({self.variant!s} on {shape}, {bias}, {dtype}, seed {self.seed})"

    # --- cases near this one

    def with_fields(self, **fields: Any) -> Case | None:
        """The case with other hyperparameters; None where they are refused or do not fit."""
        try:
            case = self.but(variant=validated(type(self.variant), {**dict(self.variant), **fields}))
            case.plan()
        except (ll.FieldError, ll.MisfitError):
            return None
        return case

    def roomier(self) -> Case | None:
        """The case without sizes of one, on a layer three times as wide (what is odd stays odd),
        with other numbers: what has an effect may be taken back by chance.
        """
        case = self.but(d_in=3 * self.d_in, d_out=3 * self.d_out, seed=self.seed + 1)
        for name in self.whole_numbers():
            if getattr(self.variant, name) == 1:
                case = case.with_fields(**{name: 3}) or case.with_fields(**{name: 2}) or case
        return case.with_fields()

    def larger(self, keep: Collection[str] = ()) -> Case | None:
        """The case on a large layer, with large ranks and many tokens; None if it does not fit.

        Args:
            keep: the fields that stay as they are.
        """
        shape = "wide" if self.d_in > self.d_out else "tall" if self.d_in < self.d_out else "square"
        d_in, d_out = LARGE[shape]
        case = self.but(d_in=d_in, d_out=d_out, tokens=LARGE_TOKENS)
        return case._with_sizes(LARGE_SIZES, keep)

    def odd(self, keep: Collection[str] = ()) -> Case | None:
        """The case on a layer of odd sizes, with odd ranks; None if it does not fit.

        Args:
            keep: the fields that stay as they are.
        """
        return self.but(d_in=ODD[0], d_out=ODD[1])._with_sizes((ODD_SIZE,), keep)

    def at_defaults(self) -> Case | None:
        """The case with the default of every number among the fields; None if it does not fit."""
        fields = type(self.variant).model_fields
        numbers = {
            name: info.default
            for name, info in fields.items()
            if type(info.default) in (int, float)
        }
        return self.with_fields(**numbers)

    def whole_numbers(self) -> list[str]:
        """The fields that hold an int now."""
        return [name for name, value in dict(self.variant).items() if type(value) is int]

    # --- its model, data and adapter

    def model(self) -> Tower:
        """The base: two blocks, each with one `layer` of the case's kind and shape.

        The same weights every time, and no draw from the global random state.
        """
        model = self._empty("cpu")
        rng = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(_well_conditioned(parameter.shape, rng))
        return model.to(self.dtype).eval()

    def inputs(self, *shape: int, seed: int = 0) -> Tensor:
        """Seeded activations, (*shape, d_in), in the base's dtype."""
        rng = torch.Generator().manual_seed(1000 * (seed + 1) + self.seed)
        return torch.randn(*shape, self.d_in, generator=rng).to(self.dtype)

    def attach(self, model: nn.Module, **options: Any) -> ll.Adapter:
        """`ll.attach` at both layers, with calibration data where the variant observes."""
        placements = ll.plan(model, self.variant, targets=TARGETS).placements
        observers = [p.variant.observe(p.site) for p in placements]
        if any(observer is not None for observer in observers):
            options.setdefault("calibration", [self.inputs(4, 16, seed=90 + i) for i in range(3)])
        if any(observer is not None and wants_gradients(observer) for observer in observers):
            options.setdefault("loss", sum_of_squares)
        return ll.attach(model, self.variant, **{"targets": TARGETS, "seed": self.seed, **options})

    def trained(
        self, model: nn.Module, *, amount: float = 0.1, seed: int = 0, **options: Any
    ) -> ll.Adapter:
        """An adapter off its start: as `attach`, then every parameter moved and projected."""
        adapter = self.attach(model, **options)
        move(adapter, amount, self.seed + seed)
        return adapter

    def plan(self) -> ll.Plan:
        """`ll.plan` without weights: on the meta device.

        Raises:
            MisfitError: the variant does not fit the shape.
        """
        return ll.plan(self._empty("meta"), self.variant, targets=TARGETS)

    def sites(self, model: nn.Module) -> dict[str, Site]:
        """The two sites of a model."""
        placements = ll.plan(model, self.variant, targets=TARGETS).placements
        return {placement.site.path: placement.site for placement in placements}

    def site(self, model: nn.Module) -> Site:
        """The first of them, that of `model.layer`."""
        return next(iter(self.sites(model).values()))

    def _with_sizes(self, sizes: Sequence[int], keep: Collection[str]) -> Case | None:
        """The case with the first of these sizes that fits, for each field that holds an int."""
        case = self
        for name in self.whole_numbers():
            if name not in keep:
                tried = (case.with_fields(**{name: size}) for size in sizes)
                case = next(filter(None, tried), case)
        return case.with_fields()

    def _empty(self, device: str) -> Tower:
        with torch.device(device), torch.random.fork_rng(devices=[]):
            return Tower([self._layer() for _ in range(2)], self.d_in, self.d_out)

    def _layer(self) -> nn.Module:
        if self.kind == "Linear":
            return nn.Linear(self.d_in, self.d_out, bias=self.bias)
        from transformers.pytorch_utils import Conv1D

        layer: nn.Module = Conv1D(self.d_out, self.d_in)
        return layer


class Block(nn.Module):
    """Attention without weights, then a feed-forward part whose first layer is adapted."""

    def __init__(self, layer: nn.Module, d_in: int, d_out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_in)
        self.layer = layer
        self.back = nn.Linear(d_out, d_in)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, d_in) to the same shape."""
        n = self.norm(x)
        h = x + scaled_dot_product_attention(n, n, n)
        out: Tensor = h + self.back(gelu(self.layer(h)))
        return out


class Tower(nn.Module):
    """Two blocks in a ModuleList, and a buffer.

    `checkpointing` turns on gradient checkpointing of every block.
    """

    offset: Tensor

    def __init__(self, layers: list[nn.Module], d_in: int, d_out: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(layer, d_in, d_out) for layer in layers])
        self.register_buffer("offset", torch.full((d_in,), 0.5))
        self.checkpointing = False

    @property
    def layer(self) -> nn.Module:
        """The first of the two layers to adapt."""
        layer: nn.Module = self.blocks[0].get_submodule("layer")
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, d_in) to the same shape."""
        x = x + self.offset
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x


def sum_of_squares(output: Tensor, _batch: object) -> Tensor:
    """A loss whose gradients do not depend on how rows are divided into batches."""
    return output.float().square().sum()


def move(adapter: ll.Adapter, amount: float, seed: int) -> None:
    """Add seeded noise to every parameter of an adapter, then project it."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(adapter.named_parameters(), key=lambda item: item[0]):
            parameter.add_(amount * torch.randn(parameter.shape, generator=rng).to(parameter))
    adapter.project()


def _well_conditioned(shape: torch.Size, rng: torch.Generator) -> Tensor:
    """A matrix with singular values from 2 down to 0.5, well apart; or a vector near 1."""
    if len(shape) < 2:
        return 1 + 0.3 * torch.randn(shape, generator=rng)
    k = min(shape)
    left = torch.linalg.qr(torch.randn(shape[0], k, generator=rng, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(shape[1], k, generator=rng, dtype=torch.float64)).Q
    matrix: Tensor = (left * torch.linspace(2, 0.5, k, dtype=torch.float64)) @ right.T
    return matrix
