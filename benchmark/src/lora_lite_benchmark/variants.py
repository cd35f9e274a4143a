"""What the benchmark asks of lora_lite: the variant behind a row's name, and the adapter on a model."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import lora_lite as ll
import torch
from lora_lite.fields import make_variant
from torch import Tensor, nn

from lora_lite_benchmark.full import BaseModel, FullModel

if TYPE_CHECKING:
    from lora_lite_benchmark.config import RunConfig

__all__ = [
    "AnyAdapter",
    "attach_adapter",
    "distribution",
    "load_adapter",
    "recommended_lr",
    "resolved_fields",
]

SPECIAL: dict[str, type[FullModel]] = {"base": BaseModel, "full": FullModel}


class AnyAdapter(Protocol):
    """What a run needs of an adapter; `ll.Adapter` has it, and so do the rows without one."""

    @property
    def num_parameters(self) -> int: ...
    @property
    def macs_per_token(self) -> int: ...
    @property
    def macs_per_forward(self) -> int: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def param_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]: ...
    def project_after(self, optimizer: torch.optim.Optimizer) -> object: ...
    def penalty(self) -> Tensor | float: ...
    def frozen(self) -> AbstractContextManager[object]: ...
    def disabled(self) -> AbstractContextManager[object]: ...
    def save(self, path: Path, *, derived: bool = True) -> None: ...


def resolved_fields(variant: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of the variant, validated, defaults included, as JSON values. Raises lora_lite's errors."""
    dumped: dict[str, Any] = json.loads(make_variant(variant, fields).model_dump_json())
    return dumped


def recommended_lr(variant: str) -> float:
    return make_variant(variant, {}).recommended_lr


def distribution(variant: str) -> list[str]:
    """The distribution that provides a variant; none for the rows without an adapter."""
    info = ll.variants().get(variant)
    return [info.distribution] if info else []


def attach_adapter(model: nn.Module, config: "RunConfig", calibration: Iterable[Any]) -> AnyAdapter:
    """The adapter that `config` asks for, on `model`; `calibration` is passed over only if it needs that."""
    if config.variant in SPECIAL:
        return SPECIAL[config.variant](model)
    chosen = {
        "targets": config.targets,
        "exclude": config.exclude,
        "layers": config.layers,
        **config.fields,
    }
    arguments: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    planned = ll.plan(model, config.variant, **arguments)
    if any(placement.variant.observe(placement.site) for placement in planned.placements):
        arguments["calibration"] = calibration
    return ll.attach(model, config.variant, seed=config.seed, **arguments)


def load_adapter(model: nn.Module, config: "RunConfig", path: Path) -> None:
    """Put the adapter of a finished run onto a fresh base."""
    if config.variant in SPECIAL:
        SPECIAL[config.variant].load(model, path)
    else:
        ll.load(model, path)
