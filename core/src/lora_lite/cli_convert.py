"""The commands `lora-lite export` and `lora-lite import`: an adapter to another format, and back.

Both load the base onto the CPU, since what an adapter changes depends on it.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from lora_lite.checkpoint import load
from lora_lite.errors import AdapterFileError, AdapterWarning, LoraLiteError
from lora_lite.format_plugins import format_named

BASE = "a directory or hub id of the model that the adapter is for"


def export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="of the adapter")
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
    format_named(options.format)  # before the base is loaded, which takes long
    if options.format == "merged":
        settings = {"tell": _tell, **settings}
    with _plain_warnings():
        adapter = load(_base(options.base), options.file)
        _tell(f"writing {len(adapter.sites)} layers as {options.format}")
        adapter.save(options.out, format=options.format, **settings)
    return f"wrote {options.out}"


def import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="a path of an installed format")
    parser.add_argument("--base", required=True, help=BASE)
    parser.add_argument("out", type=Path, help="the file to write")


def import_adapter(options: argparse.Namespace) -> str:
    """Write an adapter of another format as lora-lite's own file."""
    if not options.source.exists():
        raise AdapterFileError(f"{options.source} is not there", path=str(options.source))
    with _plain_warnings():
        adapter = load(_base(options.base), options.source)
        adapter.save(options.out)
    return f"wrote {options.out}: {len(adapter.sites)} layers"


def _base(name: str) -> nn.Module:
    """The model itself, of the class that its config names."""
    import transformers

    _tell(f"loading {name}")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        names = getattr(config, "architectures", None) or ["AutoModelForCausalLM"]
        cls = getattr(transformers, names[0], transformers.AutoModelForCausalLM)
        model: nn.Module = cls.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        raise LoraLiteError(f"{name} cannot be read as a model of transformers: {error}") from None
    return model.eval()


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
