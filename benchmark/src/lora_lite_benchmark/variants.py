"""What the benchmark asks of lora_lite: the fields of a variant, and the adapter on a model."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import lora_lite as ll
import torch
from lora_lite.fields import make_variant
from lora_lite.plugins import variant_class
from torch import Tensor, nn

from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.full import BaseModel, FullModel
from lora_lite_benchmark.parts import PARTS, layers_of, library_variant
from lora_lite_benchmark.peft_adapter import PEFT_PACKAGES, PeftAdapter

__all__ = [
    "AnyAdapter",
    "adapter_arguments",
    "attach_adapter",
    "compared_variants",
    "load_adapter",
    "packages",
    "recommended_lr",
    "resolved_fields",
]

QUANTIZING = ("bitsandbytes", "lora-lite-bitsandbytes")


def compared_variants() -> list[str]:
    """The installed variants that a benchmark compares.

    Those that train a layer's own weights are left out: the row `full` trains all of them, and the
    rows of `parts.py` train some.
    """
    return [name for name in sorted(ll.variants()) if not variant_class(name).replaces_weights]


WITHOUT_ADAPTER: dict[str, type[FullModel]] = {"base": BaseModel, "full": FullModel}
"""What stands in for the adapter in the rows that have none."""


class AnyAdapter(Protocol):
    """What a run needs of an adapter. `ll.Adapter` has it, and so have the rows without one."""

    @property
    def num_parameters(self) -> int: ...
    @property
    def macs_per_token(self) -> int | None: ...
    @property
    def macs_per_forward(self) -> int | None: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def param_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]: ...
    def project_after(self, optimizer: torch.optim.Optimizer) -> object: ...
    def penalty(self) -> Tensor | float: ...
    def frozen(self) -> AbstractContextManager[object]: ...
    def disabled(self) -> AbstractContextManager[object]: ...
    def save(self, path: Path, *, derived: bool = True) -> None: ...


def resolved_fields(variant: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of the variant as JSON values: those given, validated, and the defaults.

    Raises lora_lite's errors for an unknown variant or field, and for a value that is not allowed.
    """
    values: dict[str, Any] = json.loads(
        make_variant(library_variant(variant), fields).model_dump_json()
    )
    return values


def recommended_lr(variant: str) -> float:
    return make_variant(library_variant(variant), {}).recommended_lr


def packages(config: RunConfig) -> list[str]:
    """The packages of this row alone: those of its variant, of its implementation, of its base."""
    info = ll.variants().get(library_variant(config.variant))
    found = [info.distribution] if info else []
    if config.implementation == "peft":
        found += PEFT_PACKAGES
    if config.quantization != "none":
        found += QUANTIZING
    return found


def attach_adapter(model: nn.Module, config: RunConfig, calibration: Iterable[Any]) -> AnyAdapter:
    """Put the adapter that `config` asks for on `model`.

    `calibration` is only read if the variant observes activations at one of the layers.
    """
    if config.variant in WITHOUT_ADAPTER:
        return WITHOUT_ADAPTER[config.variant](model)
    adapter = _attach(model, config, calibration)
    return PeftAdapter.instead_of(adapter, model) if config.implementation == "peft" else adapter


def _attach(model: nn.Module, config: RunConfig, calibration: Iterable[Any]) -> ll.Adapter:
    variant, arguments = library_variant(config.variant), adapter_arguments(config)
    if config.variant in PARTS:
        arguments.update(layers_of(config.variant, model))
    plan = ll.plan(model, variant, **arguments)
    if any(placement.variant.observe(placement.site) for placement in plan.placements):
        arguments["calibration"] = calibration
    return ll.attach(model, variant, seed=config.seed, **arguments)


def adapter_arguments(config: RunConfig) -> dict[str, Any]:
    """The layers and the fields of a row, as `ll.plan` and `ll.attach` take them."""
    arguments: dict[str, Any] = {
        "targets": config.targets,
        "exclude": config.exclude,
        "layers": config.layers,
        **config.fields,
    }
    # None stands for the core's own default.
    return {name: value for name, value in arguments.items() if value is not None}


def load_adapter(model: nn.Module, config: RunConfig, path: Path) -> None:
    """Put the saved adapter of a run on a fresh base."""
    if config.variant in WITHOUT_ADAPTER:
        WITHOUT_ADAPTER[config.variant].load(model, path)
    elif config.implementation == "peft":
        PeftAdapter.load(model, path)
    else:
        ll.load(model, path)
