"""The modules of a model under the paths that adapters and files use.

Wrappers put names of their own into paths. An adapter that is saved from a wrapped model must load
into a plain one, and the reverse, so those names are left out here.
"""

from collections.abc import Iterator

from torch import nn

from lora_lite.arguments import checked_model

# Of torch.compile, of activation checkpointing, and of FSDP1.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def root_of(model: nn.Module) -> nn.Module:
    """The model itself, without the wrapper that `torch.compile` puts around it.

    Raises:
        AdapterError: not a module.
    """
    inner = getattr(checked_model(model), "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def named_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every one of its paths, without the wrappers and their names."""
    for path, module in root.named_modules(remove_duplicate=False):
        modules = module._modules
        if not any(name in modules for name in WRAPPERS):
            yield plain_path(path), module


def plain_path(path: str) -> str:
    """A path without the names that wrappers add."""
    if not any(name in path for name in WRAPPERS):
        return path
    return ".".join(name for name in path.split(".") if name not in WRAPPERS)
