"""What is trained beside an adapter, in PEFT's places.

full                 modules_to_save
full, only="bias"    bias="all"
tokens               trainable_token_indices
"""

from typing import Any

from lora_lite import AdapterError
from lora_lite.author import Base
from lora_lite.modules import named_modules
from lora_lite.warn import warn
from torch import Tensor

from lora_lite_peft.files import PREFIX, Folder
from lora_lite_peft.parts import Part


def beside_folder(part: Part, base: Base) -> Folder:
    """The tensors, and the part of the config that names them.

    Raises:
        AdapterError: the adapter is scaled, which PEFT has no place for; or PEFT would take a name
            for other modules as well.
    """
    if not part.sites:
        return Folder({}, {})
    if part.scale != 1:
        raise AdapterError(
            f"adapter {part.name!r} has scale {part.scale:g}, and PEFT has none for layers that "
            "are trained whole",
            fix='Set scale = 1, or write format="merged"',
            adapter=part.name,
        )
    state = part.state_dict()
    modules: list[str] = []
    tokens: dict[str, list[int]] = {}
    tensors: dict[str, Tensor] = {}
    has_biases = False
    for path, variant in part.sites.items():
        fields: Any = variant
        if variant.name == "tokens":
            tokens[path] = state[f"{path}.ids"].tolist()
            tensors[f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"] = state[f"{path}.rows"]
        elif fields.only == "bias":
            has_biases = True
            tensors[f"{PREFIX}{path}.bias"] = state[f"{path}.bias"]
        else:
            modules.append(path)
            tensors |= _whole(part, path, state)
    _refuse_ambiguous(part, base, modules)
    _untie(part, base, tokens, tensors)
    warn(
        f"the folder has {len(part.sites)} layers that are trained whole beside the adapter",
        advice="PEFT reads them; most servers refuse such a folder, or pass over them",
    )
    config = {
        "modules_to_save": modules or None,
        "trainable_token_indices": tokens or None,
        **({"bias": "all"} if has_biases else {}),
    }
    return Folder(config, tensors)


def _whole(part: Part, path: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a module, laid out as it keeps them."""
    attachment = part.adapter._state.attachments[path]
    module, kind = part.adapter._modules[path], attachment.layer.kind
    found = {name: state[f"{path}.{name}"] for name in attachment.specs}
    if kind.has_matrix:
        found["weight"] = kind.in_layout(module, found["weight"])
    return {f"{PREFIX}{path}.{name}": tensor for name, tensor in found.items()}


def _refuse_ambiguous(part: Part, base: Base, modules: list[str]) -> None:
    """An error for paths with which that of another module ends."""
    for path in modules:
        others = [other for other in base.paths if other.endswith(path) and other != path]
        if others:
            raise AdapterError(
                f"PEFT would take {path} for the end of {others[0]} as well",
                fix='Write format="merged", or leave this layer out of the adapter',
                adapter=part.name,
                layer=path,
            )


def _untie(
    part: Part, base: Base, tokens: dict[str, list[int]], tensors: dict[str, Tensor]
) -> None:
    """Leave out the head's rows where it is tied to an embedding: PEFT changes it with that one.

    Raises:
        AdapterError: its rows are others than the embedding's.
    """
    modules = dict(named_modules(base.root))
    for path in list(tokens):
        weight = modules[path]._parameters.get("weight")
        tied = [other for other, m in modules.items() if m._parameters.get("weight") is weight]
        for other in (other for other in tied if modules[other] is not modules[path]):
            rows, others = (part.state_dict().get(f"{place}.rows") for place in (path, other))
            if rows is None or others is None or not rows.equal(others):
                raise AdapterError(
                    f"{path} and {other} share their weight, and not the new rows of their tokens",
                    expected="PEFT has one set of rows for both",
                    fix='Write format="merged"',
                    adapter=part.name,
                    layer=path,
                )
            if not part.reads_ids(path):
                del tokens[path]
                del tensors[f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"]
