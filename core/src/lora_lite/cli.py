"""The command `lora-lite`: variants, plan, inspect, export, import, new, conform.

Each command is one function that gives its arguments to the parser, and one that runs it and
returns what is printed.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_lite import fileformat
from lora_lite.cli_convert import export_adapter, export_arguments, import_adapter, import_arguments
from lora_lite.errors import LoraLiteError, printable
from lora_lite.fields import make_variant
from lora_lite.foreign import is_own_file
from lora_lite.format_plugins import format_of
from lora_lite.hub import local_path
from lora_lite.metadata import Metadata
from lora_lite.placements import plan
from lora_lite.plugins import variant_class, variants
from lora_lite.testing.new import new

Run = Callable[[argparse.Namespace], str]
NONE_INSTALLED = "no variant is installed; try pip install lora-lite-lora"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or 1 after a message on standard error."""
    options = _parser().parse_args(arguments)
    try:
        print(options.run(options))
    except LoraLiteError as error:
        return _failed(str(error))
    except ModuleNotFoundError as error:
        package = "transformers" if error.name == "transformers" else "lora-lite-core[testing]"
        return _failed(f"this command needs {error.name}; pip install {package}")
    return 0


def _failed(message: str) -> int:
    print(f"lora-lite: {message}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lora-lite", description="Adapters for PyTorch models.")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Run, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about)
        added.set_defaults(run=run)
        return added

    _variants_arguments(command("variants", _variants, "list the installed variants"))
    _plan_arguments(
        command("plan", _plan, "show what attach would do, without loading any weights")
    )
    _inspect_arguments(
        command("inspect", _inspect, "show what an adapter's file or folder holds, without a model")
    )
    export_arguments(
        command("export", _export, "write an adapter in another format, such as a folder of PEFT")
    )
    import_arguments(
        command("import", import_adapter, "write an adapter of another format as a file of ours")
    )
    _new_arguments(
        command("new", _new, "write the package of a new variant: code, tests, CI, licence")
    )
    _conform_arguments(
        command("conform", _conform, "hold a variant to every promise of the conformance suite")
    )
    return parser


# --- variants


def _variants_arguments(parser: argparse.ArgumentParser) -> None:
    about = "load each of them, and say which cannot be used and why"
    parser.add_argument("--check", action="store_true", help=about)


def _variants(options: argparse.Namespace) -> str:
    found = variants()
    lines: list[str] = []
    broken: list[str] = []
    for info in found.values():
        lines.append(f"{info.name:<18} {info.distribution} {info.version}  ({info.target})")
        problem = _why_unusable(info.name) if options.check else ""
        if problem:
            broken.append(info.name)
            lines.append(f"  cannot be used: {problem}")
    if broken:
        print("\n".join(lines))
        raise LoraLiteError(
            f"{len(broken)} of {len(found)} variants cannot be used: {', '.join(broken)}"
        )
    return "\n".join(lines) or NONE_INSTALLED


def _why_unusable(name: str) -> str:
    try:
        variant_class(name)
    except LoraLiteError as error:
        return str(error)
    return ""


# --- plan


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    model = "a directory or hub id of a transformers model; only its configuration is read"
    parser.add_argument("model", help=model)
    parser.add_argument("variant", help="an installed variant")
    targets = "a regular expression for paths of layers; may be repeated"
    parser.add_argument("--targets", action="append", help=targets)
    exclude = "a regular expression for layers to leave out; may be repeated"
    parser.add_argument("--exclude", action="append", help=exclude)
    parser.add_argument("--layers", type=int, nargs="+", help="indices of the repeated blocks")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the variant"
    )


def _plan(options: argparse.Namespace) -> str:
    fields = dict(_assignment(text) for text in options.set)
    variant = make_variant(options.variant, fields)
    model = _empty_model(options.model)
    return str(
        plan(
            model, variant, targets=options.targets, exclude=options.exclude, layers=options.layers
        )
    )


def _assignment(text: str) -> tuple[str, Any]:
    """`r=8` as ("r", 8): a JSON value if it is one, else text."""
    field, separator, value = text.partition("=")
    if not separator:
        raise LoraLiteError(f"--set {text} is not a name=value, such as --set r=8")
    try:
        return field, json.loads(value)
    except json.JSONDecodeError:
        return field, value


def _empty_model(name: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise LoraLiteError(
            f"{name} cannot be read as a causal language model of transformers: {error}"
        ) from None
    return model


# --- inspect


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="of an adapter; or a path of an installed format, or a hub id")


def _inspect(options: argparse.Namespace) -> str:
    path = Path(local_path(options.file))
    chosen = None if is_own_file(path) else format_of(path)
    if chosen is not None:
        return "\n".join(printable(line) for line in chosen.describe(path).splitlines())
    described, tensors = fileformat.read(path)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    derived = "in the file" if described.derived else "left out; derived again on loading"
    base = "needed as it was" if described.uses_base else "the tensors do not depend on its weights"
    lines = [
        f"written by   lora-lite-core {described.core}, file format {described.format}",
        f"seed, scale  {described.seed}, {described.scale:g}",
        f"tensors      {len(tensors)}, {numbers:,} numbers: {', '.join(described.dtypes)}",
        f"derived      {derived}",
        f"base         {base}",
        *_configuration_lines(described),
    ]
    return "\n".join(printable(line) for line in lines)


def _configuration_lines(described: Metadata) -> list[str]:
    """Each variant of the file, with its fields and its layers."""
    lines = []
    for number, configuration in enumerate(described.configurations):
        name, version = configuration.variant, configuration.variant_format
        lines.append(f"variant      {name} (format {version}), {configuration.provider}")
        lines.append(f"fields       {configuration.fields}")
        lines += [f"  {path}" for path, index in described.sites.items() if index == number]
    return lines


# --- export, import


def _export(options: argparse.Namespace) -> str:
    return export_adapter(options, dict(_assignment(text) for text in options.set))


# --- new, conform


def _new_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="such as my-method")


def _new(options: argparse.Namespace) -> str:
    folder = new(options.name, Path())
    return f"wrote {folder}; next: cd {folder} && pip install -e .[test] && pytest"


def _conform_arguments(parser: argparse.ArgumentParser) -> None:
    about = "an installed variant, or module:Class of a Variant or of a VariantTests"
    parser.add_argument("variant", help=about)


def _conform(options: argparse.Namespace) -> str:
    from lora_lite.testing.conform import conform

    return conform(options.variant, partial(print, flush=True))
