"""What a user should hear although it is not an error: each as an `AdapterWarning`.

At attach: weights that stay frozen and may not be meant to. At the first training forward: layers
that are never called. At saving: what the file will not hold, or what has never changed.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from lora_lite.attachment import AdapterState, Attachment
from lora_lite.expert_attachment import ExpertAttachment
from lora_lite.find import Layer
from lora_lite.hooked import hooks_of
from lora_lite.modules import compiled_modules, layer_modules, plain_path
from lora_lite.output_head import output_heads
from lora_lite.placements import Plan
from lora_lite.reach import hold_much
from lora_lite.warn import warn

RECIPE = "a recipe trains them too: attach(model, {r'q_proj$': 'lora', %r: 'full'})"


# --- at attach


def tell_frozen(root: nn.Module, plan: Plan, trainable: Mapping[str, bool]) -> None:
    """Name what attach has frozen although the user may want it trained.

    Args:
        root: the model.
        plan: what was attached.
        trainable: whether each parameter of the base required a gradient before.
    """
    chosen = {placement.path for placement in plan.placements}
    if plan._choice.by_default:
        bare = [weight for weight in plan._others if weight.is_bare and weight.in_blocks]
        if hold_much(bare, plan._layers, plan._others):
            warn(
                "these weights stay frozen, and they are a large part of the model",
                [str(weight) for weight in bare],
                "They are bare parameters that hooks do not reach. targets= silences this",
            )
        experts = [layer for layer in plan._layers if layer.holds_experts and layer.blocks]
        experts = [layer for layer in experts if layer.path not in chosen]
        if hold_much(experts, plan._layers, plan._others):
            warn(
                "the experts stay frozen, and they are a large part of the model",
                [layer.path for layer in experts],
                "targets= adapts them as well, expert by expert: r'_proj$' is every projection, "
                "experts included; any targets= silences this",
            )
    elif plan._choice.passed_over:
        warn(
            "a pattern also matches weights that get no adapter",
            sorted(str(weight) for weight in plan._choice.passed_over),
            "Layers like these are not adapted; exclude= silences this",
        )
    heads = _heads(root, plan._layers, chosen, trainable)
    if heads:
        warn("these layers after the last block stay frozen", heads, RECIPE % f"{heads[0]}$")
    unfrozen = _unfrozen_by_hand(root, trainable, chosen, heads)
    if unfrozen:
        warn(
            "attach froze these parameters, which were left trainable in a frozen model",
            unfrozen,
            "Set requires_grad again after attach, and keep them yourself: an adapter's file does "
            "not hold them; or " + RECIPE % "norm$",
        )


def _heads(
    root: nn.Module, layers: Sequence[Layer], chosen: set[str], trainable: Mapping[str, bool]
) -> list[str]:
    """Linear layers after the last repeated block that were trainable and get no adapter.

    The output embedding is none of them: it is pretrained as the rest is.
    """
    in_blocks = [number for number, layer in enumerate(layers) if layer.blocks]
    if not in_blocks:
        return []
    output = output_heads(layers, root)
    return [
        layer.path
        for layer in layers[in_blocks[-1] + 1 :]
        if layer.is_linear
        and layer.path not in chosen
        and layer not in output
        and trainable.get(f"{layer.path}.weight", False)
    ]


def _unfrozen_by_hand(
    root: nn.Module, trainable: Mapping[str, bool], chosen: set[str], heads: Sequence[str]
) -> list[str]:
    """The parameters that were trainable, if they were a small part of a frozen model."""
    if all(trainable.values()):
        return []
    sizes = {
        plain_path(name): parameter.numel()
        for name, parameter in root.named_parameters()
        if parameter.is_floating_point()
    }
    free = [name for name, trains in trainable.items() if trains and name in sizes]
    if sum(sizes[name] for name in free) > sum(sizes[n] for n in trainable if n in sizes) / 2:
        return []
    adapted = {f"{path}.weight" for path in chosen} | {f"{path}.bias" for path in chosen}
    told = {f"{path}.weight" for path in heads} | {f"{path}.bias" for path in heads}
    return [name for name in free if name not in adapted | told]


def tell_zero_weights(paths: Sequence[str]) -> None:
    """Name the layers whose weight is 0 everywhere."""
    if paths:
        warn(
            "the weights of these layers are all zero",
            paths,
            "Methods that work on the weight's own directions get no gradient there; exclude= "
            "leaves the layers out",
        )


# --- at the first training forward


def tell_uncalled(root: nn.Module, states: Iterable[AdapterState]) -> None:
    """Name the layers that the forward did not call, so that their hooks never ran."""
    uncalled = uncalled_layers(root, states)
    if uncalled:
        warn(
            "a training forward ended without calling these layers, so their adapters do nothing",
            uncalled,
            "Their parent may read the weight without calling the layer: leave them out with "
            "exclude=. If the model calls them for some inputs only, all is well",
        )


def uncalled_layers(root: nn.Module, states: Iterable[AdapterState]) -> list[str]:
    """The paths of adapted layers whose hooks have never run, as far as can be known."""
    modules, compiled = layer_modules(root), compiled_modules(root)
    uncalled: dict[str, None] = {}
    for state in states:
        for path, attachment in state.attachments.items():
            module = modules.get(path)
            if (
                module is not None
                and module not in compiled
                and not _was_called(module, attachment)
            ):
                uncalled[path] = None
    return list(uncalled)


def _was_called(module: nn.Module, attachment: Attachment) -> bool:
    """Whether an adapter's hooks on a layer have run, as far as can be known."""
    if isinstance(attachment, ExpertAttachment):
        return attachment.was_read
    hooks = hooks_of(module)
    return hooks is None or hooks.was_called


# --- at saving


def tell_unsaved(names: Sequence[str]) -> None:
    """Name parameters of the base that are trained and will not be in the file."""
    if names:
        warn(
            "these parameters of the base are trainable, and an adapter's file does not hold them",
            names,
            "Save them yourself, or " + RECIPE % "score$",
        )


def tell_statistics(names: Sequence[str]) -> None:
    """Name running statistics of the base that training has changed."""
    if names:
        warn(
            "training changed these statistics of the base, and an adapter's file does not hold "
            "them: after loading, the model will compute something else",
            names,
            "Put the normalisation layers into eval mode while training",
        )


def tell_idle(scale: float, uncalled: Sequence[str], unchanged: Sequence[str]) -> None:
    """Say that an adapter, or parts of it, have no effect."""
    if scale == 0:
        warn("the adapter is saved with scale 0, so it will have no effect when it is loaded")
    if uncalled:
        warn("no training forward has called these layers of the adapter", uncalled)
    if unchanged:
        warn(
            "the adapter's parameters on these layers are still at their start, although the model "
            "was trained",
            unchanged,
            "Does the optimizer have adapter.parameters()? ll.check(model, batch) tells more",
        )


def still_at_start(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether no parameter of a layer has been written since it was made.

    A parameter that starts at zero, as most methods have one, also shows it by its values: some
    optimizers write in a way that torch does not count.
    """
    at_zero = False
    for parameter in parameters:
        if parameter.is_inference() or parameter._version > 0 or not parameter.requires_grad:
            return False
        at_zero = at_zero or not parameter.detach().any()
    return at_zero
