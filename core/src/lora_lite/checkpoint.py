"""Save and load: one adapter, one file, all or nothing."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from lora_lite import fileformat
from lora_lite.adapter import Adapter, adapter_of
from lora_lite.errors import AdapterFileError, BaseMismatchError, TargetError, bullets, did_you_mean
from lora_lite.fileformat import Metadata
from lora_lite.fingerprint import changed, probe_agrees
from lora_lite.hooks import Control
from lora_lite.plugins import kind_of, variant_class
from lora_lite.registry import install, refuse_unfit, refuse_wrapped
from lora_lite.state import by_site, device_of, unpack
from lora_lite.targets import Placement, named_modules, place, root_of, spot_at
from lora_lite.variant import Variant


def save(model: nn.Module, path: str | os.PathLike[str], name: str | None = None, *, derived: bool = True) -> None:
    """Save the adapter called `name`, or the only one. See `Adapter.save`.

    Raises:
        AdapterError: there is no such adapter.
        AdapterFileError: the path cannot be written.
    """
    adapter_of(model, name).save(path, derived=derived)


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    /,
    *,
    name: str = "default",
    variant: type[Variant] | None = None,
    check_base: bool = True,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Attach the adapter of a file. Nothing is initialised, no calibration data is asked for; a full file gives back the
    saved adapter bit for bit. All or nothing: an error leaves the model as it was.

    Args:
        model: the base.
        path: of the file.
        name: to attach under.
        variant: the class to use, where it is not installed as a plugin (written in a notebook, say).
        check_base: compare the base's weights with the file's fingerprint. Other weights are an error where the file's tensors
            were computed from them, else a warning.
        dtype: of the trainable tensors; None keeps the file's.

    Raises:
        AdapterFileError: a file that cannot be read, or does not fit the model; everything that is wrong is listed.
        BaseMismatchError: another base.
        UnknownVariantError, PluginError: the file's variant is not installed, or cannot be used.
        AdapterError: the name is in use, or the model cannot carry an adapter as it is.
    """
    header, tensors = fileformat.read(path)
    cls = variant or variant_class(header.variant)
    if cls.name != header.variant:
        raise AdapterFileError(f"{path} holds a {header.variant!r} adapter, and variant={cls.__qualname__} is {cls.name!r}")
    configurations, tensors = _upgraded(path, cls, header, tensors)
    root = root_of(model)
    refuse_wrapped(root)
    placements = _placements(path, root, header, configurations)
    refuse_unfit(root, placements, name)
    if check_base:
        _check_base(path, header, placements)
    if not header.derived:
        tensors = tensors | _derive(path, header, placements)
    values = unpack(placements, tensors, header.dtypes)
    for placement in placements:
        values[placement.spot.path] = _placed(placement, values[placement.spot.path], dtype)
    control = Control(name, configurations[0], header.seed, header.scale)
    control.uses_base = header.uses_base
    install(root, control, placements, values)
    return Adapter(root, control)


def _upgraded(
    path: str | os.PathLike[str], cls: type[Variant], header: Metadata, tensors: dict[str, Tensor]
) -> tuple[list[Variant], dict[str, Tensor]]:
    """The file's variants, and its tensors, in the format of the installed class."""
    if header.variant_format > cls.format:
        raise AdapterFileError(
            f"{path} has format {header.variant_format} of variant {cls.name!r}, written by {header.provider}; the installed "
            f"one reads up to {cls.format}. Upgrade its distribution"
        )
    texts = header.configurations
    if not texts or not all(0 <= index < len(texts) for index in header.sites.values()):
        raise AdapterFileError(f"{path} has damaged metadata: a site refers to a configuration that is not there")
    try:
        if header.variant_format == cls.format:
            return [cls.model_validate_json(text) for text in texts], tensors
        return _run_upgrade(cls, header, tensors)
    except ValidationError as error:
        raise AdapterFileError(f"{path} has fields that variant {cls.name!r} refuses: {error}") from None


def _run_upgrade(cls: type[Variant], header: Metadata, tensors: dict[str, Tensor]) -> tuple[list[Variant], dict[str, Tensor]]:
    variants: list[Variant | None] = [None] * len(header.configurations)
    old, upgraded = by_site(tensors, header.sites)
    for site, index in header.sites.items():
        fields, new = cls.upgrade(json.loads(header.configurations[index]), old[site], header.variant_format)
        variants[index] = cls.model_validate_json(json.dumps(fields))
        upgraded |= {f"{site}.{name}": tensor for name, tensor in new.items()}
    return [v for v in variants if v is not None], upgraded


def _placements(
    path: str | os.PathLike[str], root: nn.Module, header: Metadata, configurations: list[Variant]
) -> tuple[Placement, ...]:
    modules = dict(named_modules(root))
    missing = [f"{site}{did_you_mean(site, modules)}" for site in header.sites if site not in modules]
    if missing:
        raise AdapterFileError(
            f"{path} adapts {len(header.sites)} layers, {len(missing)} of which {type(root).__name__} does not have; "
            f"nothing was changed:{bullets(missing)}"
        )
    choices = []
    for site, index in header.sites.items():
        kind = kind_of(modules[site])
        if kind is None:
            raise TargetError(f"{site} is a {type(modules[site]).__name__}, which no installed layer kind can read")
        choices.append((spot_at(site, modules[site], kind), modules[site], configurations[index]))
    return place(choices)


def _check_base(path: str | os.PathLike[str], header: Metadata, placements: tuple[Placement, ...]) -> None:
    other = changed(header.fingerprint, {p.spot.path: p.site for p in placements})
    if not other:
        return
    told = (
        f"{path} was made on a base with other weights: {len(other)} of {len(placements)} sites differ by more than rounding "
        f"to bfloat16:{bullets(other, limit=3)}\n"
    )
    if header.uses_base:
        raise BaseMismatchError(
            f"{told}Its tensors were computed from those weights, so the model would compute something else. Load that base, "
            "or give check_base=False"
        )
    warnings.warn(f"{told}check_base=False silences this", UserWarning, stacklevel=3)


def _derive(path: str | os.PathLike[str], header: Metadata, placements: tuple[Placement, ...]) -> dict[str, Tensor]:
    """The tensors that were left out, derived again and verified."""
    derived, wrong = {}, []
    for placement in placements:
        for name, value in placement.variant.derive(placement.site).items():
            key = f"{placement.spot.path}.{name}"
            stored = value.detach().to(placement.specs[name].dtype or placement.site.dtype)
            derived[key] = stored
            if key not in header.probes or not probe_agrees(stored, header.probes[key]):
                wrong.append(key)
    if wrong:
        raise BaseMismatchError(
            f"{path} was saved without derived tensors, and {len(wrong)} of them come out differently on this base (or with "
            f"this version of torch or the plugin); load a file saved with derived=True:{bullets(wrong, limit=3)}"
        )
    return derived


def _placed(placement: Placement, values: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    device = device_of(placement.module)
    wanted = {name: dtype if spec.trainable and not spec.dtype else None for name, spec in placement.specs.items()}
    return {
        name: values[name].detach().to(device=device, dtype=wanted[name], copy=True).contiguous() for name in placement.specs
    }
