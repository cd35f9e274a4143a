"""Reading LoRA on the experts of a mixture, which PEFT calls `target_parameters`.

    lora_A (E · r, d_in)      A[e] is rows e · r to (e + 1) · r
    lora_B (d_out, r · E)     B[e] is every E-th column, from e on

PEFT wraps a module once for each of its parameters, so the tensors of all but the last lie under
one `base_layer` more. Up to version 0.18 it took a parameter (E, d_out, d_in) for (E, d_in, d_out):
what it calls A is then Bᵀ, and the other way round.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_lite import AdapterFileError
from lora_lite.author import Base
from lora_lite.experts import ExpertStack, expert_stacks
from packaging.version import InvalidVersion, Version
from torch import Tensor, nn

Layers = dict[str, dict[str, Tensor]]

WRAPPED = re.compile(r"(.+?)((?:\.base_layer)*)")
# The first version that knows how the weights of experts lie, and the last that did not.
KNOWS, DID_NOT = Version("0.19.1"), Version("0.18.999")


def split_experts(
    folder: Path, config: Mapping[str, Any], layers: Layers, base: Base
) -> tuple[Layers, Layers]:
    """The stacked tensors of experts, by the path of their parameter, and all other layers.

    Args:
        folder: for errors.
        config: of the adapter.
        layers: tensors by the path that PEFT gives them.
        base: the model.

    Raises:
        AdapterFileError: a parameter that holds no experts here, or tensors of other sizes.
    """
    targets = config.get("target_parameters") or ()
    targets = [targets] if isinstance(targets, str) else list(targets)
    if not targets:
        return {}, layers
    wrapped: dict[str, dict[int, dict[str, Tensor]]] = {}
    others: Layers = {}
    for path, parts in layers.items():
        match = WRAPPED.fullmatch(path)
        assert match is not None
        if list(_targeted(base.module(match[1]), match[1], targets)):
            wrapped.setdefault(match[1], {})[match[2].count(".base_layer")] = parts
        else:
            others[path] = parts
    if not wrapped:
        raise AdapterFileError(
            f"{folder} holds no tensors for target_parameters={targets!r}", path=str(folder)
        )
    experts: Layers = {}
    for path, by_depth in wrapped.items():
        module = base.module(path)
        names = list(_targeted(module, path, targets))
        if sorted(by_depth) != list(range(len(names))):
            raise AdapterFileError(
                f"{folder}: {path} has tensors for {len(by_depth)} parameters",
                expected=f"The config's target_parameters name {', '.join(names)}",
                path=str(folder),
            )
        for name, depth in zip(names, sorted(by_depth, reverse=True), strict=True):
            stack = expert_stacks(module).get(name)
            if stack is None:
                raise _not_experts(folder, f"{path}.{name}", module)
            parts = by_depth[depth]
            experts[f"{path}.{name}"] = _stacked(folder, config, path, module, stack, parts)
    return experts, others


def _targeted(module: nn.Module, path: str, targets: Sequence[str]) -> Iterator[str]:
    """The parameters of a module that PEFT has wrapped, the innermost first."""
    for name in module._parameters:
        full = f"{path}.{name}"
        if any(full == target or full.endswith(f".{target}") for target in targets):
            yield name


def _stacked(
    folder: Path,
    config: Mapping[str, Any],
    path: str,
    module: nn.Module,
    stack: ExpertStack,
    parts: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """A (E, r, d_in) and B (E, d_out, r)."""
    count, (d_in, d_out) = stack.count(module), stack.shape(module)
    a, b = parts.get("lora_A"), parts.get("lora_B")
    if len(parts) != 2 or a is None or b is None or len(a) != b.shape[1] or len(a) % count:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in parts.items())
        raise AdapterFileError(
            f"{folder}: {path}.{stack.parameter} has {shapes}",
            expected=f"A LoRA of its {count} experts has lora_A and lora_B, with {count} r rows "
            "and columns",
            path=str(folder),
        )
    is_turned = _is_turned(folder, config, path, module, stack, (a.shape[1], len(b)))
    a3 = a.reshape(count, -1, a.shape[1])
    b3 = b.reshape(len(b), -1, count).permute(2, 0, 1)
    if is_turned:
        a3, b3 = b3.mT, a3.mT
    if a3.shape[2] != d_in or b3.shape[1] != d_out:
        raise AdapterFileError(
            f"{folder}: {path}.{stack.parameter} is a LoRA of {a.shape[1]} -> {len(b)}",
            expected=f"The experts of this model are {d_in} -> {d_out}",
            path=str(folder),
        )
    return {"lora_A": a3.contiguous(), "lora_B": b3.contiguous()}


def _is_turned(
    folder: Path,
    config: Mapping[str, Any],
    path: str,
    module: nn.Module,
    stack: ExpertStack,
    sizes: tuple[int, int],
) -> bool:
    """Whether lora_A is the factor on the side of the outputs.

    The sizes tell, unless the experts are square; then PEFT's version does.
    """
    d_in, d_out = stack.shape(module)
    if d_in != d_out:
        return sizes == (d_out, d_in)
    try:
        version = Version(str(config.get("peft_version")))
    except InvalidVersion:
        version = None
    if version is not None and version >= KNOWS:
        return bool(getattr(module, "is_transposed", False)) != stack.is_transposed
    if version is not None and version <= DID_NOT:
        return not stack.is_transposed
    raise AdapterFileError(
        f"{folder}: the experts of {path} are square, and the config's "
        f"peft_version={config.get('peft_version')!r} does not tell how its tensors lie",
        expected=f"PEFT has turned them round in version {KNOWS}",
        fix="Save it again with a newer PEFT, which writes its version",
        path=str(folder),
    )


def _not_experts(folder: Path, path: str, module: nn.Module) -> AdapterFileError:
    return AdapterFileError(
        f"{folder} adapts the parameter {path} of a {type(module).__name__}",
        expected="Of parameters, only those that hold the experts of a mixture can be adapted here",
        path=str(folder),
    )
