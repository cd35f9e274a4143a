"""Attach a variant to a model, and the handle to what was attached."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_lite.calibration import calibrate
from lora_lite.errors import AdapterError, AdapterFileError, TargetError, VariantContractError
from lora_lite.fileformat import FilePath, Metadata, dtypes_of, write
from lora_lite.fingerprint import fingerprint, probe
from lora_lite.hooks import Control, Entry
from lora_lite.layers import is_dtensor, whole
from lora_lite.plugins import provider
from lora_lite.registry import adapted_root, install, opened, refuse_unfit, refuse_wrapped, remove
from lora_lite.state import place_values, unpack
from lora_lite.targets import (
    Indices,
    Overrides,
    Patterns,
    Placement,
    named_modules,
    place,
    plan,
    root_of,
)
from lora_lite.variant import Site, Tensors, TensorSpec, Variant


def attach(
    model: nn.Module,
    variant: str | Variant,
    /,
    *,
    name: str = "default",
    targets: Patterns = None,
    exclude: Patterns = None,
    layers: Indices = None,
    overrides: Overrides = None,
    calibration: Iterable[Any] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **fields: Any,
) -> "Adapter":
    """Attach a variant to the linear layers of a model. All or nothing: an error leaves the model as it was.

    The base is frozen (and `detach` restores its `requires_grad`); only the adapter's parameters train.

    Args:
        model: any module; its base weights are read, never written.
        variant: the name of an installed variant, or an instance of a `Variant` subclass.
        name: of the adapter, for several on one model.
        targets: which layers; see `plan` for this and the next three.
        exclude: taken away from them.
        layers: indices of the repeated blocks.
        overrides: other fields for some sites.
        calibration: model inputs (mappings, tuples or tensors; a DataLoader works), where the variant needs them.
        dtype: of the trainable tensors. float32 by default also on a bfloat16 base, since bfloat16 loses small updates.
        seed: of the random start values, which depend on (seed, site path, tensor name) alone.
        fields: hyperparameters, where `variant` is a name.

    Raises:
        UnknownVariantError, PluginError, FieldError, TargetError, LayerKindError, MisfitError: as `plan`.
        CalibrationError: calibration data is missing, superfluous, empty or rejected.
        AdapterError: the name is in use, or the model cannot carry an adapter as it is.
    """
    chosen = plan(
        model,
        variant,
        targets=targets,
        exclude=exclude,
        layers=layers,
        overrides=overrides,
        **fields,
    )
    root = root_of(model)
    refuse_wrapped(root)
    refuse_unfit(root, chosen.placements, name)
    if not dtype.is_floating_point:
        raise AdapterError(f"dtype={dtype}: the trainable tensors need a floating-point dtype")
    control = Control(name, chosen.variant, seed)
    with ExitStack() as stack:
        stack.enter_context(opened(root))
        for other in adapters(root).values():
            stack.enter_context(other.disabled())
        statistics = calibrate(root, chosen.placements, calibration)
        placements = _specialize(chosen.placements, statistics)
        values = {
            p.spot.path: _start_values(p, statistics.get(p.spot.path, {}), control, dtype)
            for p in placements
        }
        install(root, control, placements, values)
    return Adapter(root, control)


def adapters(model: nn.Module) -> "dict[str, Adapter]":
    """The adapters of a model by name: also of a copy, an unpickled model, or one inside a wrapper (DDP, `torch.compile`).

    Raises:
        AdapterError: `model` is only a part of the model through which they were attached.
    """
    root, controls = adapted_root(model)
    return {name: Adapter(root, control) for name, control in controls.items()}


def adapter_of(model: nn.Module, name: str | None) -> "Adapter":
    """The adapter called `name`, or the only one.

    Raises:
        AdapterError: there is none of this name, or none at all, or several and no name was given.
    """
    found = adapters(model)
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name not in found:
        asked = f"no adapter named {name!r}" if name is not None else "no single adapter to choose"
        raise AdapterError(
            f"the model has {asked}; give the name= of one that it has ({', '.join(sorted(found)) or 'none'})"
        )
    return found[name]


def detach(model: nn.Module, name: str | None = None) -> None:
    """Detach the adapter called `name`, or the only one. The last to leave leaves the model bit for bit what it was.

    Raises:
        AdapterError: see `adapter_of`; or the model's parameters are sharded.
    """
    adapter_of(model, name).detach()


class Adapter:
    """A variant attached to a model under a name: what `attach` and `load` return, and `adapters` finds again.

    Attributes:
        name: it was attached under.
        variant: as asked for; `sites` has the one of each site.
        seed: of its random start values.
    """

    def __init__(self, root: nn.Module, control: Control) -> None:
        self._root, self._control = root, control
        self.name, self.variant, self.seed = control.name, control.variant, control.seed
        modules = dict(named_modules(root))
        self._modules = {path: modules[path] for path in control.entries}

    @property
    def sites(self) -> dict[str, Variant]:
        """The variant of each site, by path: overrides and specialisation included."""
        return {path: entry.variant for path, entry in self._control.entries.items()}

    @property
    def num_parameters(self) -> int:
        """Trainable numbers."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def macs_per_token(self) -> int:
        """Multiply-accumulates that it adds for each token, over all sites."""
        return sum(entry.variant.macs_per_token(site) for entry, site, _ in self._each())

    @property
    def macs_per_forward(self) -> int:
        """Multiply-accumulates that it adds once a forward, over all sites."""
        return sum(entry.variant.macs_per_forward(site) for entry, site, _ in self._each())

    def __repr__(self) -> str:
        if not self._control.entries:
            return f"Adapter({self.name!r}: {self.variant}, detached)"
        suffixes = Counter(path.rpartition(".")[2] for path in self.sites)
        frozen = sum(t.numel() for _, spec, t in self._tensors() if not spec.trainable)
        state = f"scale {self.scale:g}" + ("" if self._control.enabled else ", disabled")
        return (
            f"Adapter({self.name!r}: {self.variant}, {state}\n"
            f"  sites       {len(self.sites)} ({', '.join(f'{s} x {n}' for s, n in suffixes.items())})\n"
            f"  parameters  {self.num_parameters:,} trainable, {frozen:,} frozen\n"
            f"  MACs        {self.macs_per_token:,} a token, {self.macs_per_forward:,} a forward)"
        )

    # --- training

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The trainable parameters, as (`path.tensor`, parameter)."""
        return ((key, parameter) for key, spec, parameter in self._tensors() if spec.trainable)

    def param_groups(self, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, with weight decay kept off the tensors that must not decay.

        Args:
            weight_decay: of the decaying tensors.
        """
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for _, spec, parameter in self._tensors():
            if spec.trainable:
                groups[spec.decay].append(parameter)
        return [
            {"params": found, "weight_decay": weight_decay * decay}
            for decay, found in groups.items()
            if found
        ]

    def project(self) -> None:
        """Bring the parameters back into the variant's allowed set, now. See `project_after`."""
        with torch.no_grad():
            for entry, site, t in self._each():
                entry.variant.project(site, t)

    def project_after(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Call `project` after every step of `optimizer`. The returned handle's `remove()` ends that."""
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        return inner.register_step_post_hook(
            lambda *_: self.project() if self._control.entries else None
        )

    def penalty(self) -> Tensor:
        """The sum of the variant's penalties over all sites, a scalar to be added to the loss (0 for most variants)."""
        terms = [
            term
            for entry, site, t in self._each()
            if (term := entry.variant.penalty(site, t)) is not None
        ]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    # --- switches

    @property
    def scale(self) -> float:
        """The factor s in y' = y + s Δ: 1 is the adapter, 0 the base. Do not change it between a forward and its
        backward where gradient checkpointing is on: the recomputed forward would use the new value.
        """
        return self._control.scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._attached().scale = float(value)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model without this adapter, for the duration of the context."""
        control = self._attached()
        before, control.enabled = control.enabled, False
        try:
            yield
        finally:
            control.enabled = before

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """For generation: `Variant.prepare` runs once instead of once a forward. Forwards with gradients prepare afresh.

        Raises:
            AdapterError: on leaving, if the adapter's tensors were changed inside: outputs may be those of the old values.
        """
        control = self._attached()
        before, control.frozen = control.frozen, True
        versions = [t._version for _, _, t in self._tensors()]
        try:
            yield
        finally:
            control.frozen = before
            for entry in control.entries.values():
                entry.prepared = {}
        if versions != [t._version for _, _, t in self._tensors()]:
            raise AdapterError(
                f"adapter {self.name!r} was changed under frozen(), which is for inference only"
            )

    # --- state

    def state_dict(self, derived: bool = True) -> dict[str, Tensor]:
        """What is saved, as `{"path.tensor": tensor}`, detached.

        Args:
            derived: whether to include the tensors that can be derived from the base again.
        """
        state: dict[str, Tensor] = {}
        for entry, site, t in self._each():
            saved = entry.variant.state_dict(
                site, {name: whole(value.detach()) for name, value in t.items()}
            )
            state |= {f"{site.path}.{name}": value for name, value in saved.items()}
        left_out = {} if derived else self._derived()
        return {key: value for key, value in state.items() if key not in left_out}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a full `state_dict` into the attached tensors, strictly: all of it or nothing.

        Raises:
            AdapterFileError: tensors that are missing, extra, misshapen, mistyped or not finite; all of them are listed.
        """
        entries = self._attached().entries
        values = unpack(
            [
                Placement(e.spot, self._modules[path], e.variant, e.specs)
                for path, e in entries.items()
            ],
            tensors,
        )
        with torch.no_grad():
            for _, site, t in self._each():
                for name, target in t.items():
                    target.copy_(values[site.path][name])

    def save(self, path: FilePath, *, derived: bool = True) -> None:
        """Write the adapter to a safetensors file, atomically.

        On a sharded model (FSDP2) this is collective: every process calls it, rank 0 writes.

        Args:
            path: of the file.
            derived: whether tensors that can be derived from the base again go into the file. Without them the file is small,
                and loading derives and verifies them: close to the saved ones, not bitwise equal.

        Raises:
            AdapterFileError: the path cannot be written, or `derived=False` and nothing was derived from the base alone.
        """
        state, left_out = self.state_dict(derived), {} if derived else self._derived()
        if not derived and not left_out:
            raise AdapterFileError(
                f"derived=False: nothing of {self.variant} can be derived from the base alone; leave it out"
            )
        header = Metadata(
            variant=self.variant.name,
            variant_format=self.variant.format,
            provider=" ".join(provider(type(self.variant))).strip(),
            core=metadata.version("lora-lite-core"),
            sites={path: variant.model_dump_json() for path, variant in self.sites.items()},
            seed=self.seed,
            scale=self.scale,
            dtypes=dtypes_of(state),
            derived=derived,
            uses_base=self._control.uses_base,
            fingerprint=fingerprint({site.path: site for _, site, _ in self._each()}),
            probes={key: probe(whole(value)) for key, value in left_out.items()},
        )
        if (
            not any(is_dtensor(t) for _, _, t in self._tensors())
            or torch.distributed.get_rank() == 0
        ):
            write(path, state, header)

    def detach(self) -> None:
        """Take the adapter off the model. The last one to leave leaves it bit for bit what it was, `requires_grad` included.

        Raises:
            AdapterError: detached already, or the model's parameters are sharded.
        """
        control = self._attached()
        refuse_wrapped(self._root)
        remove(self._root, control)
        self._root, self._modules = nn.Module(), {}

    # --- inside

    def _attached(self) -> Control:
        if not self._control.entries:
            raise AdapterError(f"adapter {self.name!r} ({self.variant}) is detached")
        return self._control

    def _each(self) -> Iterator[tuple[Entry, Site, dict[str, nn.Parameter]]]:
        for path, entry in self._attached().entries.items():
            yield entry, Site(entry.spot, self._modules[path]), entry.stored(self._modules[path])

    def _tensors(self) -> Iterator[tuple[str, TensorSpec, nn.Parameter]]:
        for entry, site, t in self._each():
            yield from (
                (f"{site.path}.{name}", spec, t[name]) for name, spec in entry.specs.items()
            )

    def _derived(self) -> dict[str, nn.Parameter]:
        return {key: parameter for key, spec, parameter in self._tensors() if spec.derived}


def _specialize(
    placements: Sequence[Placement], statistics: Mapping[str, Mapping[str, Tensor]]
) -> Sequence[Placement]:
    """Let each variant choose per-site variants for its own sites from their statistics."""
    chosen: dict[str, Variant | None] = {p.spot.path: p.variant for p in placements}
    for variant in dict.fromkeys(p.variant for p in placements):
        sites = {p.spot.path: p.site for p in placements if p.variant == variant}
        changed = variant.specialize(sites, {path: statistics.get(path, {}) for path in sites})
        others = {
            path: v
            for path, v in changed.items()
            if path not in sites or type(v) not in (type(variant), type(None))
        }
        if others:
            raise VariantContractError(
                f"{variant}.specialize gives {others}: sites it was not given, or another class"
            )
        chosen.update(changed)
    if all(p.variant is chosen[p.spot.path] for p in placements):
        return placements
    kept = [
        (p.spot.path, p.module, v) for p in placements if (v := chosen[p.spot.path]) is not None
    ]
    if not kept:
        raise TargetError(f"{placements[0].variant} drops every one of its {len(placements)} sites")
    return place(kept)


def _start_values(
    placement: Placement, statistics: Tensors, control: Control, dtype: torch.dtype
) -> dict[str, Tensor]:
    site, variant = placement.site, placement.variant
    with torch.no_grad():
        derived = variant.derive(site)
        started = variant.init(
            site, derived, statistics, partial(_generator, control.seed, site.path)
        )
    control.uses_base |= site.weight_was_read
    return place_values(placement, {**derived, **started}, dtype)


def _generator(seed: int, path: str, tensor: str) -> torch.Generator:
    """It depends on these three alone."""
    digest = hashlib.sha256(f"{seed}/{path}/{tensor}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
