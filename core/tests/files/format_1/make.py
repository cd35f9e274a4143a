"""Writes the files of this folder; run once, with the last core that wrote file format 1 (d2e2547).

    python core/tests/files/format_1/make.py

Each `<case>.safetensors` is an adapter of `base()`. `expected.safetensors` holds, for each case,
the adapter's state (`<case>/<path>.<tensor>`) and what the adapted model gave for `inputs()`
(`<case>/output`). No number here is random: the base is the same with every version of torch.
"""

import math
from pathlib import Path
from typing import Any

import lora_lite as ll
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

FOLDER = Path(__file__).parent

# case -> the variant, its fields, the other arguments of attach, and those of save
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "lora": ("lora", {"r": 2, "alpha": 3.0}, {"overrides": {"up": {"r": 3}}, "seed": 7}, {}),
    "dora": ("dora", {"r": 2}, {}, {}),
    "pissa": ("pissa", {"r": 2}, {}, {}),
    "delora": ("delora", {"r": 2, "start": "subtract"}, {}, {}),
    "ia3": ("ia3", {}, {"targets": "."}, {}),
    "road": ("road", {"group_size": 4}, {}, {}),
    "hra": ("hra", {"r": 2}, {}, {}),
    "eva": ("eva", {"r": 2}, {"calibration": True}, {}),
    "lora_xs": ("lora_xs", {"r": 2}, {}, {}),
    "lora_xs_slim": ("lora_xs", {"r": 2}, {}, {"derived": False}),
    "antipasto": ("antipasto", {"r": 4}, {}, {}),
}


class Block(nn.Module):
    """x + W_down tanh(W_up x + b)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The residual step."""
        out: Tensor = x + self.down(torch.tanh(self.up(x)))
        return out


class Base(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        """One block after the other."""
        for block in self.blocks:
            x = block(x)
        return x


def numbers(*shape: int, start: float) -> Tensor:
    """Values in (-1, 1) without a pattern, the same everywhere."""
    count = math.prod(shape)
    return torch.tensor([math.sin(start + 7.3 * i * i) for i in range(count)]).reshape(shape)


def base() -> Base:
    """The model that every file is for."""
    model = Base()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(numbers(*parameter.shape, start=number) / 2)
    return model


def inputs() -> Tensor:
    """Five rows."""
    return numbers(5, 8, start=100)


def main() -> None:
    """Write every file."""
    expected: dict[str, Tensor] = {}
    for case, (variant, fields, arguments, options) in CASES.items():
        model = base()
        if "calibration" in arguments:
            arguments = {**arguments, "calibration": [numbers(20, 8, start=200)]}
        adapter = ll.attach(model, variant, **fields, **arguments)
        with torch.no_grad():
            for number, parameter in enumerate(adapter.parameters()):
                parameter.add_(numbers(*parameter.shape, start=50 + number) / 8)
            adapter.project()
            adapter.scale = 0.75
            expected[f"{case}/output"] = model(inputs())
        adapter.save(FOLDER / f"{case}.safetensors", **options)
        for key, tensor in adapter.state_dict().items():
            expected[f"{case}/{key}"] = tensor.clone()
    save_file(expected, FOLDER / "expected.safetensors")


if __name__ == "__main__":
    main()
