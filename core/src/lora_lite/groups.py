"""Parameter groups for an optimizer: which tensors decay, and which have a learning rate of their
own.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lora_lite.arguments import is_number
from lora_lite.errors import AdapterError
from lora_lite.shared import tensor_name
from lora_lite.tensor_spec import TensorSpec

Groups = list[dict[str, Any]]
Rates = Mapping[str, float]


def parameter_groups(
    tensors: Iterable[tuple[str, TensorSpec, nn.Parameter]], weight_decay: float, lr: Rates | None
) -> Groups:
    """One group for each pair of weight decay and learning rate that occurs.

    The order depends on the adapters alone, so that an optimizer's state can be loaded again.

    Args:
        tensors: every stored tensor, as (`path.tensor`, its spec, parameter).
        weight_decay: of the tensors that may decay.
        lr: the learning rate of some tensors, by their names.

    Raises:
        AdapterError: a weight decay or a learning rate is not a number of at least 0, or no
            trainable tensor has one of the names.
    """
    rates = {} if lr is None else _checked_rates(lr)
    _refuse_negative("weight_decay", weight_decay)
    trainable = [(tensor_name(key), spec, p) for key, spec, p in tensors if spec.trainable]
    _refuse_unknown(rates, sorted({name for name, _, _ in trainable}))
    groups: dict[tuple[bool, float | None], list[nn.Parameter]] = {(True, None): []}
    groups[False, None] = []
    for name, spec, parameter in trainable:
        groups.setdefault((spec.decay, rates.get(name)), []).append(parameter)
    return [
        _group(parameters, weight_decay if decays else 0.0, rate)
        for (decays, rate), parameters in groups.items()
        if parameters
    ]


def _group(parameters: list[nn.Parameter], weight_decay: float, lr: float | None) -> dict[str, Any]:
    group: dict[str, Any] = {"params": parameters, "weight_decay": float(weight_decay)}
    if lr is not None:
        group["lr"] = lr
    return group


def _checked_rates(lr: Rates) -> dict[str, float]:
    if not isinstance(lr, Mapping):
        raise AdapterError(
            f"lr={lr!r} is not a mapping from names of tensors to learning rates",
            fix="Write lr={'B': 16 * rate}; the rate of all other tensors is the optimizer's lr",
        )
    for name, rate in lr.items():
        _refuse_negative(f"lr[{name!r}]", rate)
    return dict(lr)


def _refuse_negative(argument: str, value: object) -> None:
    if not is_number(value) or not 0 <= value < float("inf"):  # type: ignore[operator]
        raise AdapterError(f"{argument}={value!r} is not a number of at least 0")


def _refuse_unknown(rates: Rates, names: list[str]) -> None:
    for name in rates:
        if name not in names:
            raise AdapterError(
                f"lr gives a learning rate to {name!r}, and no trainable tensor has this name",
                expected=f"The trainable tensors are called {', '.join(names)}",
            )
