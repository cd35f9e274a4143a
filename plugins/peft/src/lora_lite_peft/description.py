"""What a folder of PEFT holds, for people."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

# The names of modules, which are listed as the paths of tensors below.
SHOWN_AS_PATHS = ("target_modules",)
# The method's part of a tensor's name, after the path of its layer.
PART = re.compile(
    r"\.((?:base_layer\.)*(?:lora|hada|lokr|oft|boft|miss|hira|c3a|shira|fourierft|ia3|hra|road|delora"
    r"|vera|vblora|randlora|token_adapter|trainable_tokens|ln_tuning)\w*(?:\.\w+)*|weight|bias)$"
)


def description(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Type, base, settings that are set, and the tensors of each layer."""
    numbers = sum(tensor.numel() for tensor in tensors.values())
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    left_out = ("peft_type", "base_model_name_or_path", "peft_version", *SHOWN_AS_PATHS)
    settings = {name: value for name, value in config.items() if value and name not in left_out}
    version = config.get("peft_version") or "unknown"
    return "\n".join(
        [
            f"PEFT         {config.get('peft_type')}, written by version {version}",
            f"base         {config.get('base_model_name_or_path') or 'unknown'}",
            f"tensors      {len(tensors)}, {numbers:,} numbers: {', '.join(dtypes)}",
            f"settings     {', '.join(f'{name}={value!r}' for name, value in settings.items())}",
            *_layers(tensors),
        ]
    )


def _layers(tensors: Mapping[str, Tensor]) -> list[str]:
    layers: dict[str, list[str]] = {}
    for name, tensor in sorted(tensors.items()):
        match = PART.search(name)
        path, part = (name[: match.start()], match[1]) if match else (name, "")
        layers.setdefault(path, []).append(f"{part} {list(tensor.shape)}".strip())
    return [f"  {path}: {', '.join(parts)}" for path, parts in layers.items()]
