"""The commands `lora-lite export` and `lora-lite import`: an adapter to another format, and back.

Both load the base onto the CPU, since what an adapter changes depends on it. A whole checkpoint is
merged without that, a layer at a time, where the base's files allow it.
"""

import argparse
import inspect
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_lite.checkpoint import load
from lora_lite.errors import AdapterFileError, AdapterWarning, LoraLiteError
from lora_lite.format_plugins import format_named
from lora_lite.hub import is_hub_id
from lora_lite.merged_from_disk import plan_from_disk, write_from_disk

BASE = "a directory or hub id of the model that the adapter is for"


def export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="of the adapter; or a path that load takes, or a hub id")
    parser.add_argument("--base", required=True, help=BASE)
    about = 'the format to write: "merged", or that of an installed plugin, such as "peft"'
    parser.add_argument("--format", required=True, help=about)
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="an option of the format"
    )
    parser.add_argument("out", type=Path, help="where to write")


def export_adapter(options: argparse.Namespace, settings: dict[str, Any]) -> str:
    """Write an adapter's file in another format.

    Args:
        options: as parsed.
        settings: the format's options.
    """
    chosen = format_named(options.format)  # before the base is loaded, which takes long
    with _plain_warnings():
        if options.format == "merged":
            paths = Path(options.file), Path(options.base), options.out
            if not settings and _merged_from_disk(*paths):
                return f"wrote {options.out}"
        if "tell" in inspect.signature(chosen.write).parameters:
            settings = {"tell": _tell, **settings}
        adapter = load(_base(options.base), options.file)
        _tell(f"writing {len(adapter.sites)} layers as {options.format}")
        adapter.save(options.out, format=options.format, **settings)
    return f"wrote {options.out}"


def _merged_from_disk(file: Path, base: Path, out: Path) -> bool:
    """Write a merged checkpoint without the model in memory, if its files lend themselves to it."""
    if not (file.is_file() and base.is_dir()):
        return False
    config, cls = _architecture(str(base))
    make = getattr(cls, "_from_config", None) or cls.from_config
    with torch.device("meta"):
        empty = make(config)
    plan = plan_from_disk(file, base, empty)
    if isinstance(plan, str):
        _tell(f"the base has to be in memory, since {plan}")
        return False
    _tell(f"merging {len(plan.modules)} layers, one at a time")
    write_from_disk(plan, out, _tell)
    return True


def import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a path of an installed format, or a hub id")
    parser.add_argument("--base", required=True, help=BASE)
    parser.add_argument("out", type=Path, help="the file to write")


def import_adapter(options: argparse.Namespace) -> str:
    """Write an adapter of another format as lora-lite's own file."""
    if not Path(options.source).exists() and not is_hub_id(options.source):
        raise AdapterFileError(f"{options.source} is not there", path=str(options.source))
    with _plain_warnings():
        adapter = load(_base(options.base), options.source)
        adapter.save(options.out)
    return f"wrote {options.out}: {len(adapter.sites)} layers"


def _base(name: str) -> nn.Module:
    """The model itself, of the class that its config names."""
    _, cls = _architecture(name)
    _tell(f"loading {name}")
    try:
        model: nn.Module = cls.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        raise _not_a_model(name, error) from None
    return model.eval()


def _architecture(name: str) -> tuple[Any, Any]:
    """The config of a model, and the class that it names."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _not_a_model(name, error) from None
    names = getattr(config, "architectures", None) or ["AutoModelForCausalLM"]
    return config, getattr(transformers, names[0], transformers.AutoModelForCausalLM)


def _not_a_model(name: str, error: Exception) -> LoraLiteError:
    return LoraLiteError(f"{name} cannot be read as a model of transformers: {error}")


def _tell(line: str) -> None:
    """Progress goes where it does not disturb what a script reads."""
    print(f"lora-lite: {line}", file=sys.stderr, flush=True)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as lines for people, without the place in the code."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", AdapterWarning)
        warnings.showwarning = lambda message, *_: print(message, file=sys.stderr)
        yield
