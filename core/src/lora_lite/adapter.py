"""The handle to an adapter: what `attach` and `load` return, and `adapters` finds again."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_lite import after_step
from lora_lite.adapter_state import overwrite_tensors, saved_tensors
from lora_lite.adapter_text import adapter_text
from lora_lite.arguments import finite_scale, flag
from lora_lite.attachment import AdapterState, Attachment
from lora_lite.author_mistakes import calling, checked_macs, checked_penalty
from lora_lite.change import LayerChange, changes_at
from lora_lite.errors import AdapterError
from lora_lite.fileformat import FilePath
from lora_lite.groups import Groups, Rates, parameter_groups
from lora_lite.layers import whole
from lora_lite.lost import refuse_lost_layers
from lora_lite.low_rank import LowRank, low_rank
from lora_lite.merged import MergedLayer, merged_layer
from lora_lite.registry import refuse_detached, take_off
from lora_lite.restore import restore
from lora_lite.saving import save_adapter, write_format
from lora_lite.shared import tensor_key
from lora_lite.site import Site
from lora_lite.tensor_spec import TensorSpec
from lora_lite.variant import Variant


class Adapter:
    """A variant attached to a model under a name, or a recipe of several.

    Attributes:
        name: under which it is attached.
        seed: of its random start values.
    """

    def __init__(
        self, root: nn.Module, state: AdapterState, modules: Mapping[str, nn.Module]
    ) -> None:
        self._root = root
        self._state = state
        self._modules = {path: modules[path] for path in state.attachments}
        self.name = state.name
        self.seed = state.seed

    # --- what it is

    @property
    def variant(self) -> Variant:
        """The variant, as asked for; `sites` has the one of each layer.

        Raises:
            AdapterError: a recipe of several variants was attached.
        """
        return self._state.recipe.variant

    @property
    def sites(self) -> dict[str, Variant]:
        """The variant of each layer, by path: overrides and specialisation included."""
        return {path: each.variant for path, each in self._state.attachments.items()}

    @property
    def num_parameters(self) -> int:
        """The number of trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def macs_per_token(self) -> int:
        """The multiply-accumulates that it adds for each token, in all layers."""
        return sum(checked_macs(a.methods, "macs_per_token", site) for a, site, _ in self._each())

    @property
    def macs_per_forward(self) -> int:
        """The multiply-accumulates that it adds once in each forward pass, in all layers."""
        return sum(checked_macs(a.methods, "macs_per_forward", site) for a, site, _ in self._each())

    def __repr__(self) -> str:
        return adapter_text(self)

    # --- training

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters, as (`path.tensor`, parameter)."""
        for key, spec, parameter in self._tensors():
            if spec.trainable:
                yield key, parameter

    def param_groups(self, weight_decay: float = 0.0, *, lr: Rates | None = None) -> Groups:
        """Parameter groups for an optimizer, with weight decay kept off what must not decay.

        Args:
            weight_decay: of the tensors that may decay.
            lr: the learning rate of some tensors, by their names, such as `{"B": 16 * rate}` for
                LoRA+ (Hayou et al. 2024, arXiv:2402.12354). All others have the optimizer's.

        Raises:
            AdapterError: a number below 0, or a name that no trainable tensor has.
        """
        return parameter_groups(self._tensors(), weight_decay, lr)

    def project(self) -> None:
        """Bring the parameters back into the variant's allowed set, now. See `project_after`."""
        after_step.project(self)

    def project_after(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """After every step of `optimizer`, do what the method asks for; `remove()` ends that.

        That is to call `project`, and for methods with a schedule to count the step (`advance`).
        """
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        return inner.register_step_post_hook(self._after_step)

    def _after_step(self, *_: Any) -> None:
        if self._state.attachments:
            after_step.advance(self)
            after_step.project(self)

    def penalty(self) -> Tensor:
        """The sum of the variant's penalties in all layers: a scalar to be added to the loss.

        It is 0 for a variant without one.
        """
        penalties = []
        for attachment, site, t in self._each():
            values = {name: whole(tensor) for name, tensor in t.items()}
            with calling(attachment.variant, "penalty", site.path):
                penalty = attachment.methods.penalty(site, values)
            penalty = checked_penalty(attachment.variant, penalty, site.path)
            if penalty is not None:
                penalties.append(penalty)
        return torch.stack(penalties).sum() if penalties else torch.zeros(())

    # --- switches

    @property
    def scale(self) -> float:
        """The factor s in y' = y + s Δ: 1 is the adapter, 0 the base.

        Do not change it between a forward and its backward under gradient checkpointing: the
        forward that is computed again would use the new value.
        """
        return self._state.scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._attached().scale = finite_scale(value)

    @property
    def enabled(self) -> bool:
        """Whether it is on. A model whose adapters are all off is the base, bit for bit."""
        return self._state.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._attached().switch(flag(value, "enabled"))

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without this adapter. Several may overlap; it is for all threads alike."""
        state, token = self._attached(), object()
        try:
            state.disable(token)
            yield
        finally:
            state.end_disable(token)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """For generation: casts and `Variant.prepare` run once instead of once a forward.

        Forwards with gradients do both afresh. Several may overlap.

        Raises:
            AdapterError: on leaving, if the adapter's tensors were changed inside: outputs may be
                those of the old values.
        """
        state, token = self._attached(), object()
        versions = self._versions()
        try:
            state.freeze(token)
            yield
        finally:
            state.end_freeze(token)
        if state.attachments and versions != self._versions():
            raise AdapterError(
                f"adapter {self.name!r} was changed under frozen(), which is for inference only",
                adapter=self.name,
            )

    def _versions(self) -> list[int]:
        """How often each tensor was written; torch does not count it for tensors of inference."""
        tensors = [tensor for _, _, tensor in self._tensors()]
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]

    # --- state

    def state_dict(self, derived: bool = True) -> dict[str, Tensor]:
        """What is saved, as `{"path.tensor": tensor}`, detached.

        On a sharded model (FSDP2) every process must call this.

        Args:
            derived: whether to include the tensors that can be derived from the base again.

        Raises:
            AdapterError: a layer was replaced, or holds only a shard of a tensor.
        """
        self.verify()
        return saved_tensors(self, derived)

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a full `state_dict` into the attached tensors: all of it or nothing.

        On a sharded model (FSDP2) every process must call this.

        Raises:
            AdapterFileError: tensors that are missing, extra, misshapen, of another dtype or not
                finite; all of them are listed.
            AdapterError: a layer was replaced, or holds only a shard of a tensor.
        """
        self.verify()
        overwrite_tensors(self, tensors)

    def low_rank(self, rank: int | None = None) -> dict[str, LowRank]:
        """The change of every layer as factors, y' - y = B (A x) + c, by path.

        Exact at the present `scale` for every change of low rank. The model is not touched.

        Args:
            rank: the largest rank to keep. Where a change is of higher rank, its largest part is
                kept, and `error` says how much of it is lost. None refuses instead.

        Raises:
            AdapterError: a change is of full rank and no rank is given; or it is not linear.
        """
        return low_rank(self._changes(), rank)

    def merged(self) -> dict[str, MergedLayer]:
        """Weight W + ΔW and bias b + c of every layer, at the present `scale`, by path.

        They are as of a plain linear layer, rounded to the base's dtype once. The model is not
        touched.

        Raises:
            AdapterError: a change is not linear.
        """
        return {change.site.path: merged_layer(change) for change in self._changes()}

    def save(
        self,
        path: FilePath,
        *,
        derived: bool = True,
        format: str | None = None,  # noqa: A002 (the word for it)
        **options: Any,
    ) -> None:
        """Write the adapter to a file of safetensors, atomically; or write it in another format.

        On a sharded model (FSDP2) every process must call this; rank 0 writes.

        Args:
            path: of the file, or of the folder that the format writes.
            derived: whether tensors that can be derived from the base again go into the file.
                Without them it is small, and loading derives and verifies them: close to the saved
                ones, not bitwise equal.
            format: "merged" for a whole checkpoint with the change added, or the name of an
                installed format, such as "peft".
            options: of the format.

        Raises:
            AdapterFileError: the path cannot be written; the tensors could not be loaded again;
                or `derived=False`, and nothing can be derived from the base alone.
            AdapterError: a layer was replaced, or holds only a shard of a tensor; or the format
                has no place for this adapter.
            PluginError: the format is not installed, or cannot be used.
        """
        if format is None:
            save_adapter(path, self, derived, options)
        else:
            write_format(path, self, format, derived, options)

    def restore(self, path: FilePath) -> None:
        """Put what was saved to a file into this adapter, to go on training: all of it or nothing.

        The parameters stay the same objects, so an optimizer keeps them. The scale is the file's.
        On a sharded model (FSDP2) every process must call this.

        Raises:
            AdapterFileError: the file cannot be read or is damaged; or it holds another variant,
                other hyperparameters, layers, tensors or dtypes than this adapter has.
            BaseMismatchError: it was saved on a base with other weights.
        """
        restore(self, path)

    def detach(self) -> None:
        """Take the adapter off the model. After the last one, the model is bit for bit as before.

        An interrupted detach is finished before the interruption is passed on.

        Raises:
            AdapterError: detached already, or the model's parameters are sharded.
        """
        take_off(self._root, self._attached(), self._modules)
        self._root, self._modules = nn.Module(), {}

    # --- inside

    def verify(self) -> None:
        """Check that every layer of the adapter is still where it was attached.

        Raises:
            AdapterError: a layer was replaced or removed, or has lost its tensors.
        """
        refuse_lost_layers(self._root, self._attached(), self._modules)

    def _attached(self) -> AdapterState:
        refuse_detached(self._state)
        return self._state

    def _each(self) -> Iterator[tuple[Attachment, Site, dict[str, nn.Parameter]]]:
        """Every attachment with its layer and the tensors that are stored there."""
        for path, attachment in self._attached().attachments.items():
            module = self._modules[path]
            yield attachment, Site(attachment.layer, module), attachment.stored(module)

    def _changes(self) -> Iterator[LayerChange]:
        """What it changes at each layer."""
        self.verify()
        for path, attachment in self._attached().attachments.items():
            yield from changes_at(attachment, self._modules[path])

    def _tensors(self) -> Iterator[tuple[str, TensorSpec, nn.Parameter]]:
        """Every stored tensor once, with its key and spec."""
        found: dict[str, tuple[TensorSpec, nn.Parameter]] = {}
        for attachment, site, t in self._each():
            for name, spec in attachment.specs.items():
                key = tensor_key(site.path, attachment.variant.name, name, spec)
                found.setdefault(key, (spec, t[name]))  # layers may share it
        return ((key, *each) for key, each in found.items())
