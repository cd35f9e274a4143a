"""One pass of calibration data, streamed to every site's observer.

Observers of gradients take a backward pass too. No parameter requires a gradient then: the graph
begins at the outputs of the observed layers, and nothing but these gets a gradient.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_lite.attachment import AdapterState
from lora_lite.author_mistakes import calling, describe
from lora_lite.errors import CalibrationError
from lora_lite.layers import layer_input
from lora_lite.masks import Masks
from lora_lite.per_expert import PerExpert
from lora_lite.placements import Placement
from lora_lite.variant import GradientObserver, Observer

Loss = Callable[[Any, Any], Tensor]
DATA = "an iterable of model inputs, such as a DataLoader"


class Calibration:
    """One pass over calibration data, and the way back from it.

    Every adapter is disabled meanwhile: what is attached already must not change what a new adapter
    starts from. `restore` puts the model back, after the pass or wherever it was interrupted.

    Args:
        root: the model.
        placements: of the variants on their layers.
        others: the adapters that are attached already.
    """

    def __init__(
        self, root: nn.Module, placements: Sequence[Placement], others: Iterable[AdapterState]
    ) -> None:
        self.root = root
        self.others = list(others)
        self.observers: dict[str, Observer | GradientObserver] = {}
        self.modules: dict[str, nn.Module] = {}
        for placement in placements:
            if isinstance(placement.methods, PerExpert):
                continue  # it has refused variants that observe
            with calling(placement.variant, "observe", placement.path), torch.inference_mode(False):
                observer = placement.variant.observe(placement.site)
            if observer is not None and not placement.layer.kind.forms_rows:
                raise CalibrationError(
                    f"{placement.variant.name} observes the inputs of {placement.path}, which are "
                    "never formed (an embedding or a convolution)",
                    fix="Leave the layer out with exclude=",
                    layers=(placement.path,),
                )
            if observer is not None:
                self.observers[placement.path] = observer
                self.modules[placement.path] = placement.module
        self.training: list[tuple[nn.Module, bool]] = []
        self.handles: list[RemovableHandle] = []
        self.called: set[str] = set()
        self.masks: Masks | None = None
        self.leaves: list[Tensor] = []

    @property
    def wants_gradients(self) -> bool:
        """Whether any of the observers asks for a backward pass."""
        return any(map(wants_gradients, self.observers.values()))

    def restore(self) -> None:
        """Put the model back as it was before the pass. It may be called again."""
        for handle in self.handles:
            handle.remove()
        for module, training in self.training:
            module.training = training
        for state in self.others:
            state.end_disable(self)

    def run(
        self, batches: Iterable[Any] | None, loss: Loss | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """The statistics of every site that observes, after one pass in eval mode.

        A batch is what the model is called with: a mapping (keywords), a tuple or list (positions),
        or one argument. Rows that a mask marks as padding are dropped; see `masks`. Nothing is kept
        of a batch but what the observers keep.

        Args:
            batches: the data.
            loss: of the model's output and the batch, for observers of gradients; None takes the
                output's `loss`.

        Raises:
            CalibrationError: data is missing, not needed or empty, the model rejects a batch, a
                mask cannot be matched, there is no loss, or a site is never called, or never
                reached by a gradient.
        """
        if not self.observers:
            return {}
        assert batches is not None
        for state in self.others:
            state.disable(self)
        self.training = [(module, module.training) for module in self.root.modules()]
        self.root.eval()
        for path, module in self.modules.items():
            watch = _Watch(self, path)
            self.handles.append(module.register_forward_hook(watch.see, with_kwargs=True))
        with torch.inference_mode(False), torch.set_grad_enabled(self.wants_gradients):
            self._pass(batches, loss)
        self.restore()
        silent = [path for path in self.observers if path not in self.called]
        if silent:
            raise CalibrationError(
                "these layers were never called during calibration, or no gradient reached them"
                if self.wants_gradients
                else "these layers were never called during calibration",
                details=silent,
                fix="Leave them out with exclude=, or give data that reaches them",
                layers=silent,
            )
        return {path: observer.result() for path, observer in self.observers.items()}

    def _pass(self, batches: Iterable[Any], loss: Loss | None) -> None:
        device = next((p.device for p in self.root.parameters()), torch.device("cpu"))
        has_encoder = any(".encoder." in f".{path}." for path, _ in self.root.named_modules())
        number = -1
        for number, batch in enumerate(batches):
            self.masks = Masks(batch, device, has_encoder=has_encoder)
            try:
                output = call(self.root, batch, device)
                if self.wants_gradients:
                    self._backward(output, batch, loss)
            except CalibrationError:
                raise
            except Exception as error:
                raise CalibrationError(
                    f"the model rejects calibration batch {number} ({describe_batch(batch)}): "
                    f"{type(error).__name__}: {error}",
                    expected="A mapping gives keywords, a tuple or list positions",
                    batch=number,
                ) from error
        if number < 0:
            raise CalibrationError(
                "calibration= is empty",
                fix="Give at least one batch; an iterator can be used only once",
            )

    def _backward(self, output: Any, batch: Any, loss: Loss | None) -> None:
        """Show the gradients of one batch's loss; no parameter gets any."""
        value = _loss_of(output) if loss is None else loss(output, batch)
        leaves, self.leaves = self.leaves, []
        if not isinstance(value, Tensor) or value.numel() != 1:
            given = "the model's output has no loss" if loss is None else "loss= returns no scalar"
            raise CalibrationError(
                f"{given}, but {describe_batch(value)}",
                expected="An observer wants gradients, which are those of a scalar",
                fix="Put labels into the batches, or give loss=, a function of output and batch",
            )
        if not value.requires_grad:
            raise CalibrationError(
                "the loss does not depend on any of the observed layers",
                fix="Compute it from the model's output, without no_grad or detach",
            )
        torch.autograd.grad(value.sum(), leaves, allow_unused=True)


def _loss_of(output: Any) -> Any:
    """What a model says its loss is; None if it says nothing."""
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)


class _Watch:
    """The hook that shows one layer's rows to its observer."""

    def __init__(self, calibration: Calibration, path: str) -> None:
        self.calibration = calibration
        self.path = path

    def see(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
    ) -> Tensor | None:
        masks, observer = self.calibration.masks, self.calibration.observers[self.path]
        assert masks is not None
        x_rows = masks.rows(self.path, layer_input(args, kwargs).detach())
        y_rows = masks.rows(self.path, y.detach())
        if not wants_gradients(observer):
            self.calibration.called.add(self.path)
            with torch.no_grad():
                cast(Observer, observer).update(x_rows, y_rows)
            return None
        if not y.requires_grad:
            leaf = y.detach().requires_grad_()
            self.calibration.leaves.append(leaf)
            y = leaf.clone()  # the model may write to it
        see = partial(self.see_gradient, masks, x_rows.clone(), y_rows.clone())
        y.register_hook(see)  # type: ignore[no-untyped-call]
        return y

    def see_gradient(self, masks: Masks, x_rows: Tensor, y_rows: Tensor, grad_y: Tensor) -> None:
        """The same, once the gradient of y is there."""
        self.calibration.called.add(self.path)
        observer = cast(GradientObserver, self.calibration.observers[self.path])
        with torch.no_grad():
            observer.update(x_rows, y_rows, masks.rows(self.path, grad_y.detach()))


def wants_gradients(observer: Observer | GradientObserver) -> bool:
    """Whether an observer sees gradients too."""
    return bool(getattr(observer, "wants_gradients", False))


def check_data(
    placements: Sequence[Placement],
    observers: Mapping[str, Observer | GradientObserver],
    batches: object,
    loss: object,
) -> None:
    """Check the arguments `calibration=` and `loss=`.

    Args:
        placements: what is attached.
        observers: by the paths of the layers whose variants need data.
        batches: as given.
        loss: as given.

    Raises:
        CalibrationError: one is missing, not needed, or not what it should be.
    """
    observed = observers.keys()
    names = ", ".join(sorted({placement.variant.name for placement in placements}))
    in_need = dict.fromkeys(str(p.variant) for p in placements if p.path in observed)
    if not observed and batches is not None:
        raise CalibrationError(
            f"{names} needs no calibration data with these fields", fix="Leave calibration= out"
        )
    if observed and batches is None:
        raise CalibrationError(
            f"{' and '.join(in_need)} needs calibration data", fix=f"Give calibration= {DATA}"
        )
    if loss is not None and not any(map(wants_gradients, observers.values())):
        raise CalibrationError(
            f"{names} looks at no gradients with these fields", fix="Leave loss= out"
        )
    if loss is not None and not callable(loss):
        raise CalibrationError(
            f"loss={loss!r} is not a function",
            expected="It is given the model's output and the batch, and returns a scalar",
        )
    is_one_batch = isinstance(batches, Mapping | Tensor | str | bytes)
    if observed and (is_one_batch or not isinstance(batches, Iterable)):
        raise CalibrationError(
            f"calibration= is {describe_batch(batches)}",
            expected=f"It is {DATA}",
            fix="Give one batch as [batch]",
        )


def call(model: nn.Module, batch: Any, device: torch.device) -> Any:
    """`model(batch)`, with the tensors of the batch moved to `device`, as constants."""
    if isinstance(batch, Mapping):
        return model(**{key: _moved(value, device) for key, value in batch.items()})
    arguments = batch if isinstance(batch, tuple | list) else (batch,)
    return model(*[_moved(value, device) for value in arguments])


def _moved(value: Any, device: torch.device) -> Any:
    return value.detach().to(device) if isinstance(value, Tensor) else value


def describe_batch(batch: Any) -> str:
    """A batch in a few words, for an error."""
    if isinstance(batch, Mapping):
        return ", ".join(f"{key}: {describe_batch(value)}" for key, value in batch.items())
    if isinstance(batch, Tensor):
        return describe(batch)
    return type(batch).__name__
