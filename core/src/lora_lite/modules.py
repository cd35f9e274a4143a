"""The modules of a model under the paths that adapters and files use.

Wrappers put names of their own into paths. An adapter that is saved from a wrapped model must load
into a plain one, and the reverse, so those names are left out here.
"""

from collections.abc import Iterator

from torch import nn

from lora_lite.arguments import checked_model
from lora_lite.experts import expert_stacks

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


def layer_modules(root: nn.Module) -> dict[str, nn.Module]:
    """The module at every path at which an adapter can be: every module, and every parameter that
    holds the experts of a mixture.
    """
    found = dict(named_modules(root))
    for path, module in list(found.items()):
        found.update((f"{path}.{name}".lstrip("."), module) for name in expert_stacks(module))
    return found


def compiled_modules(root: nn.Module) -> set[nn.Module]:
    """Every module in a part of the model that torch.compile runs: hooks leave no trace there."""
    parts = [module for module in root.modules() if _is_compiled(module)]
    return {module for part in parts for module in part.modules()}


def _is_compiled(module: nn.Module) -> bool:
    """Whether a module is `torch.compile(module)`, or was compiled in place."""
    if "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None:
        return True
    # `model.forward = torch.compile(model.forward)`
    return hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")


def plain_path(path: str) -> str:
    """A path without the names that wrappers add."""
    if not any(name in path for name in WRAPPERS):
        return path
    return ".".join(name for name in path.split(".") if name not in WRAPPERS)
