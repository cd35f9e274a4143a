"""Save and load: one adapter, one file, all or nothing."""

import json
import warnings
from collections.abc import Mapping

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from lora_lite.adapter import Adapter, adapter_of
from lora_lite.errors import AdapterFileError, BaseMismatchError, bullets, did_you_mean
from lora_lite.fileformat import FilePath, Metadata, dtypes_of, read
from lora_lite.fingerprint import changed, probe_agrees
from lora_lite.hooks import Control
from lora_lite.plugins import variant_class
from lora_lite.registry import install, refuse_unfit, refuse_wrapped
from lora_lite.state import by_site, own_copies, unpack
from lora_lite.targets import Placement, named_modules, place, root_of
from lora_lite.variant import Tensors, Variant


def save(
    model: nn.Module, path: FilePath, name: str | None = None, *, derived: bool = True
) -> None:
    """Save the adapter called `name`, or the only one. See `Adapter.save`.

    Raises:
        AdapterError: there is no such adapter.
        AdapterFileError: the path cannot be written.
    """
    adapter_of(model, name).save(path, derived=derived)


def load(
    model: nn.Module,
    path: FilePath,
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
    header, tensors = read(path)
    cls = variant or variant_class(header.variant)
    if cls.name != header.variant:
        raise AdapterFileError(
            f"{path} holds a {header.variant!r} adapter, and variant={cls.__qualname__} is {cls.name!r}"
        )
    variants, saved = _upgraded(path, cls, header, tensors)
    root = root_of(model)
    refuse_wrapped(root)
    placements = _placements(path, root, variants)
    refuse_unfit(root, placements, name)
    if check_base:
        _check_base(path, header, placements)
    if not header.derived:
        saved = {**saved, **_derive(path, header, placements)}
    mistyped = {
        key: t.dtype for key, t in tensors.items() if dtypes_of({key: t})[0] not in header.dtypes
    }
    known = [
        f"{key}: dtype {dtype}, expected as saved: {', '.join(header.dtypes)}"
        for key, dtype in mistyped.items()
    ]
    values = unpack(placements, saved, known)
    for p in placements:
        dtypes = {
            tensor: dtype if spec.trainable and not spec.dtype else None
            for tensor, spec in p.specs.items()
        }
        values[p.spot.path] = own_copies(p, values[p.spot.path], dtypes)
    control = Control(
        name, next(iter(variants.values())), header.seed, header.scale, header.uses_base
    )
    install(root, control, placements, values)
    return Adapter(root, control)


def _upgraded(
    path: FilePath, cls: type[Variant], header: Metadata, tensors: Tensors
) -> tuple[dict[str, Variant], Tensors]:
    """The variant of each site, and the file's tensors, in the format of the installed class."""
    if header.variant_format > cls.format:
        newer = f"{path} has format {header.variant_format} of variant {cls.name!r}, written by {header.provider}"
        raise AdapterFileError(
            f"{newer}; the installed one reads up to {cls.format}. Upgrade its distribution"
        )
    texts = dict(header.sites)
    try:
        if header.variant_format < cls.format:
            old, tensors = by_site(tensors, texts), {}
            for site, saved in old.items():
                fields, new = cls.upgrade(json.loads(texts[site]), saved, header.variant_format)
                texts[site] = json.dumps(fields)
                tensors = {**tensors, **{f"{site}.{name}": tensor for name, tensor in new.items()}}
        made = {text: cls.model_validate_json(text) for text in set(texts.values())}
        return {site: made[text] for site, text in texts.items()}, tensors
    except ValidationError as error:
        raise AdapterFileError(
            f"{path} has fields that variant {cls.name!r} refuses: {error}"
        ) from None


def _placements(
    path: FilePath, root: nn.Module, variants: Mapping[str, Variant]
) -> tuple[Placement, ...]:
    modules = dict(named_modules(root))
    if missing := [
        f"{site}{did_you_mean(site, modules)}" for site in variants if site not in modules
    ]:
        lacks = f"{len(missing)} of which {type(root).__name__} does not have"
        raise AdapterFileError(
            f"{path} adapts {len(variants)} layers, {lacks}; nothing was changed:{bullets(missing)}"
        )
    return place((site, modules[site], variant) for site, variant in variants.items())


def _check_base(path: FilePath, header: Metadata, placements: tuple[Placement, ...]) -> None:
    other = changed(header.fingerprint, {p.spot.path: p.site for p in placements})
    count = f"{len(other)} of {len(placements)} sites differ by more than rounding to bfloat16"
    told = f"{path} was made on a base with other weights: {count}:{bullets(other, limit=3)}\n"
    if other and header.uses_base:
        raise BaseMismatchError(
            f"{told}Its tensors were computed from those weights. Load that base, or give check_base=False"
        )
    if other:
        warnings.warn(f"{told}check_base=False silences this", UserWarning, stacklevel=3)


def _derive(
    path: FilePath, header: Metadata, placements: tuple[Placement, ...]
) -> dict[str, Tensor]:
    """The tensors that were left out, derived again and verified."""
    derived = {
        f"{p.spot.path}.{name}": value.detach().to(p.specs[name].dtype or p.site.dtype)
        for p in placements
        for name, value in p.variant.derive(p.site).items()
    }
    wrong = [
        key
        for key, value in derived.items()
        if key not in header.probes or not probe_agrees(value, header.probes[key])
    ]
    if wrong:
        differ = f"{len(wrong)} of them come out differently on this base (or with this version of torch or the plugin)"
        told = f"{path} was saved without derived tensors, and {differ}; load a file saved with derived=True"
        raise BaseMismatchError(f"{told}:{bullets(wrong, limit=3)}")
    return derived
