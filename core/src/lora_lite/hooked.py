"""Hooks of ours among a module's own: to find them, to put them there and to take them away.

A hook is found by the object that it is a method of. Nothing else is remembered of it, so that
hooks can be taken away also where their registration was interrupted.
"""

from typing import Any

from torch import nn

from lora_lite.experts import expert_stacks
from lora_lite.hooks import LayerHooks
from lora_lite.stand_in import ExpertHooks

# Where torch keeps the hooks of a module, and what it notes of them.
HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
)
NOTES = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def hooks_of(module: nn.Module) -> LayerHooks | None:
    """The adapter hooks on a layer, if it has any."""
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        owner = owner_of(hook)
        if isinstance(owner, LayerHooks):
            return owner
    return None


def hook_layer(module: nn.Module) -> LayerHooks:
    """The adapter hooks on a layer, put there if it has none."""
    hooks = hooks_of(module)
    if hooks is None:
        has_experts = bool(expert_stacks(module))
        hooks = ExpertHooks() if has_experts else LayerHooks()
        module.register_forward_pre_hook(hooks.before, with_kwargs=True)
        # Ahead of the hooks that are there, so that users' own hooks see the adapted y.
        module.register_forward_hook(
            hooks.after, with_kwargs=True, prepend=True, always_call=has_experts
        )
    return hooks


def unhook(module: nn.Module, owner: object) -> None:
    """Take every hook of `owner` off a module."""
    for kept in HOOKS:
        hooks = getattr(module, kept)
        for number in [number for number, hook in hooks.items() if owner_of(hook) is owner]:
            for noted in NOTES:
                getattr(module, noted).pop(number, None)
            del hooks[number]


def owner_of(hook: Any) -> object:
    """The object whose method a hook is; torch wraps some hooks once more."""
    wrapped = getattr(hook, "hook", hook)
    return getattr(wrapped, "__self__", None)
