"""Save and load: one adapter, one file, all or nothing."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from lora_lite.adapter import Adapter
from lora_lite.arguments import adapter_name, flag, listed, trainable_dtype
from lora_lite.attaching import adapter_of
from lora_lite.attachment import AdapterState
from lora_lite.author_mistakes import calling, checked_tensors
from lora_lite.errors import AdapterFileError, BaseMismatchError, FieldError
from lora_lite.fileformat import FilePath, dtypes_of, read
from lora_lite.fingerprint import changed, probe_agrees
from lora_lite.foreign import is_own_file
from lora_lite.format_plugins import format_of
from lora_lite.hub import local_path
from lora_lite.loading import first_of_each_class, load_foreign, own_values, placed, put_on
from lora_lite.metadata import Configuration, Metadata
from lora_lite.modules import root_of
from lora_lite.placements import Placement
from lora_lite.plugins import variant_class
from lora_lite.recipe import Recipe
from lora_lite.registry import CHANGING, release_changing, undo
from lora_lite.rename import Renaming, renamed
from lora_lite.state import by_layer, flat, refuse_overflow, unpack
from lora_lite.unfit import refuse_unfit
from lora_lite.variant import Tensors, Variant
from lora_lite.warn import warn
from lora_lite.wrapped import refuse_wrapped

Classes = type[Variant] | Iterable[type[Variant]] | None


def save(
    model: nn.Module,
    path: FilePath,
    name: str | None = None,
    *,
    derived: bool = True,
    format: str | None = None,  # noqa: A002 (the word for it)
    **options: Any,
) -> None:
    """Save the adapter called `name`, or the only one. See `Adapter.save`.

    Raises:
        AdapterError: there is no such adapter.
        AdapterFileError: the path cannot be written, or the tensors could not be loaded again.
        PluginError: the format is not installed, or cannot be used.
    """
    adapter_of(model, name).save(path, derived=derived, format=format, **options)


def load(
    model: nn.Module,
    path: FilePath,
    /,
    *,
    name: str = "default",
    variant: Classes = None,
    check_base: bool = True,
    dtype: torch.dtype | str | None = None,
    rename: Renaming = None,
) -> Adapter:
    """Attach the adapter of a file, or of a path of an installed format, such as a folder of PEFT.

    Nothing is initialised and no calibration data is needed: a full file gives back the saved
    adapter bit for bit. All or nothing: after an error, or an interruption at any line, the model
    is as it was.

    Args:
        model: the base.
        path: of the file; or a path that an installed format recognises, which takes name=, dtype=
            and rename= alone; or, where nothing is at the path, an id on the Hugging Face hub:
            "user/name" or "user/name@revision".
        name: under which to attach the adapter.
        variant: the class to use, or several, if they are not installed as plugins (written in a
            notebook, say).
        check_base: whether to compare the base's weights with the file's fingerprint. Other weights
            are an error if the file's tensors were computed from them, and a warning else.
        dtype: of the trainable tensors; None keeps the file's.
        rename: `{regular expression: replacement}` for the paths of the file's layers, if this
            model names them otherwise.

    Raises:
        AdapterFileError: a file that cannot be read, or does not fit the model; everything that is
            wrong is listed.
        BaseMismatchError: another base.
        UnknownVariantError, PluginError: the file's variant or format is not installed, or cannot
            be used.
        AdapterError: the name is in use, or the model cannot carry an adapter as it is.

    Warns:
        AdapterWarning: another base, which the adapter's tensors do not depend on.
    """
    adapter_name(name)
    dtype = None if dtype is None else trainable_dtype(dtype)
    flag(check_base, "check_base")
    path = local_path(path)
    is_foreign = _is_of_another_format(path)
    other = format_of(Path(path)) if is_foreign else None
    if other is not None:
        return load_foreign(other, Path(path), model, name, dtype, rename)

    # 1. what the file says
    described, tensors = read(path)
    known = list(_mistyped(described, tensors))
    described, tensors = renamed(path, described, tensors, rename)
    variants, tensors = _upgraded(path, described, tensors, _by_name(variant))

    root = root_of(model)
    state: AdapterState | None = None
    modules: dict[str, nn.Module] = {}
    try:
        CHANGING.acquire()

        # 2. where it goes
        refuse_wrapped(root)
        placements = placed(path, root, variants)
        refuse_unfit(root, placements, name)
        if check_base:
            _check_base(path, described, placements)

        # 3. its tensors
        if not described.derived:
            tensors = {**tensors, **_derive(path, described, placements)}
        unpacked = unpack(placements, tensors, known, path=str(path))
        values = own_values(placements, unpacked, dtype)
        refuse_overflow(flat(placements, values))

        # 4. onto the model
        modules.update((placement.path, placement.module) for placement in placements)
        state = _state(name, described, variants)
        adapter = put_on(root, placements, values, state)
        CHANGING.release()
        return adapter
    except BaseException:
        if state is not None:
            undo(root, state, modules)
        release_changing()
        raise


def _is_of_another_format(path: object) -> bool:
    """Whether there is something at a path that is not a file of lora-lite's own format."""
    if not isinstance(path, str | os.PathLike):
        return False
    try:
        return os.path.exists(path) and not is_own_file(Path(path))
    except ValueError:  # a null byte, which no path has
        return False


def _state(name: str, described: Metadata, variants: Mapping[str, Variant]) -> AdapterState:
    return AdapterState(
        name,
        Recipe(first_of_each_class(variants.values())),
        described.seed,
        described.scale,
        described.uses_base,
        is_loaded=True,
    )


# --- 1. what the file says


def _mistyped(described: Metadata, tensors: Tensors) -> Iterable[str]:
    """The tensors whose dtype is not one that the file announces."""
    for key, tensor in tensors.items():
        if dtypes_of({key: tensor})[0] not in described.dtypes:
            expected = ", ".join(described.dtypes)
            yield f"{key}: dtype {tensor.dtype}, expected as saved: {expected}"


def _by_name(classes: Classes) -> dict[str, type[Variant]]:
    """The classes that the caller gives, by the names of their variants."""
    if classes is None:
        return {}
    given = [classes] if isinstance(classes, type) else classes
    several = listed(given)
    found: list[Any] = [given] if several is None else several
    for cls in found:
        if not (isinstance(cls, type) and issubclass(cls, Variant)):
            raise FieldError(
                f"variant={cls!r} is not a class",
                expected="It is a subclass of Variant, or several",
            )
    return {cls.name: cls for cls in found}


def _upgraded(
    path: FilePath, described: Metadata, tensors: Tensors, given: Mapping[str, type[Variant]]
) -> tuple[dict[str, Variant], dict[str, Tensor]]:
    """The variant of each layer, and the tensors, in the formats of the installed classes."""
    names = {configuration.variant for configuration in described.configurations}
    unused = [name for name in given if name not in names]
    if unused:
        raise AdapterFileError(
            f"{path} holds {', '.join(sorted(map(repr, names)))}, and variant= gives "
            f"{', '.join(map(repr, unused))}",
            path=str(path),
        )
    classes = {name: given.get(name) or variant_class(name) for name in names}
    made: dict[tuple[str, str], Variant] = {}
    variants: dict[str, Variant] = {}
    upgraded: dict[str, Tensor] = {}
    layers = by_layer(tensors, described.sites)
    for where, saved in layers.items():
        configuration = described.of(where)
        cls = classes[configuration.variant]
        fields, saved = _in_format_of(path, cls, configuration, saved)
        if (cls.name, fields) not in made:
            made[cls.name, fields] = _made(path, cls, fields)
        variants[where] = made[cls.name, fields]
        upgraded.update({f"{where}.{name}": tensor for name, tensor in saved.items()})
    strays = {key: t for key, t in tensors.items() if key.rpartition(".")[0] not in layers}
    return variants, {**upgraded, **strays}


def _in_format_of(
    path: FilePath, cls: type[Variant], configuration: Configuration, saved: dict[str, Tensor]
) -> tuple[str, dict[str, Tensor]]:
    """The fields, as JSON, and the tensors of one layer in the format of the installed class."""
    theirs = configuration.variant_format
    if theirs == cls.format:
        return configuration.fields, saved
    if theirs > cls.format:
        raise AdapterFileError(
            f"{path} has format {theirs} of variant {cls.name!r}, written by "
            f"{configuration.provider}",
            expected=f"The installed one reads formats up to {cls.format}",
            fix="Upgrade its distribution",
            path=str(path),
        )
    try:
        fields = json.loads(configuration.fields)
        with calling(cls.model_construct(), "upgrade"):
            fields, given = cls.upgrade(fields, saved, theirs)
        return json.dumps(fields), checked_tensors(cls.model_construct(), "upgrade", given, "")
    except (ValueError, RecursionError) as error:
        if isinstance(error, AdapterFileError):
            error.path = error.path or str(path)
            raise
        raise AdapterFileError(
            f"{path} has fields that variant {cls.name!r} cannot upgrade: {error}", path=str(path)
        ) from None


def _made(path: FilePath, cls: type[Variant], fields: str) -> Variant:
    try:
        return cls.model_validate_json(fields)
    except (ValidationError, ValueError, RecursionError) as error:
        raise AdapterFileError(
            f"{path} has fields that variant {cls.name!r} refuses: {error}", path=str(path)
        ) from None


# --- 2. where it goes


def _check_base(path: FilePath, described: Metadata, placements: tuple[Placement, ...]) -> None:
    sites = {p.path: p.site for p in placements if not p.variant.replaces_weights}
    unknown = [where for where in sites if where not in described.fingerprint]
    if unknown:
        raise AdapterFileError(
            f"{path} does not say on which base it was made",
            details=unknown,
            fix="Give check_base=False to load it all the same",
            path=str(path),
        )
    other = changed(described.fingerprint, sites)
    if not other:
        return
    problem = (
        f"{path} was made on a base with other weights: {len(other)} of {len(sites)} layers "
        "differ by more than rounding to bfloat16"
    )
    if described.uses_base:
        raise BaseMismatchError(
            problem,
            details=_first(other),
            expected="Its tensors were computed from the weights of its own base",
            fix="Load that base, or give check_base=False",
            path=str(path),
        )
    warn(problem, _first(other), "check_base=False silences this")


def _first(paths: list[str], count: int = 3) -> list[str]:
    rest = [f"and {len(paths) - count} more"] if len(paths) > count else []
    return paths[:count] + rest


# --- 3. its tensors


@torch.no_grad()
def _derive(
    path: FilePath, described: Metadata, placements: tuple[Placement, ...]
) -> dict[str, Tensor]:
    """The tensors that were left out, derived again and verified."""
    derived: dict[str, Tensor] = {}
    for placement in placements:
        with calling(placement.variant, "derive", placement.path):
            given = placement.methods.derive(placement.site)
        for name, value in checked_tensors(
            placement.variant, "derive", given, placement.path
        ).items():
            dtype = placement.specs[name].dtype or placement.site.dtype
            derived[placement.key(name)] = value.detach().to(dtype)
    wrong = [key for key, value in derived.items() if not _agrees(described, key, value)]
    if wrong:
        raise BaseMismatchError(
            f"{path} was saved without derived tensors, and {len(wrong)} of them come out "
            "differently on this base",
            details=_first(wrong),
            expected="Another version of torch or of the plugin may be the reason as well",
            fix="Load a file that was saved with derived=True",
            path=str(path),
            tensors=wrong,
        )
    return derived


def _agrees(described: Metadata, key: str, value: Tensor) -> bool:
    return key in described.probes and probe_agrees(value, described.probes[key])
