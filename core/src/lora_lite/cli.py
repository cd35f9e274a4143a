"""The command `lora-lite`: variants, plan, inspect, new, conform."""

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
from lora_lite.errors import LoraLiteError
from lora_lite.plugins import make_variant, variant_class, variants
from lora_lite.targets import plan
from lora_lite.testing.new import new


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or 1 after a message on standard error."""
    options = _parser().parse_args(arguments)
    try:
        print(options.run(options))
        return 0
    except LoraLiteError as error:
        told = str(error)
    except ModuleNotFoundError as error:
        package = "transformers" if error.name == "transformers" else "lora-lite-core[testing]"
        told = f"this command needs {error.name}; pip install {package}"
    print(f"lora-lite: {told}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lora-lite", description="Adapters for PyTorch models.")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(
        run: Callable[[argparse.Namespace], str], about: str, **positional: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__.strip("_"), help=about)
        added.set_defaults(run=run)
        for name, text in positional.items():
            added.add_argument(name, help=text)
        return added

    listing = command(_variants, "list the installed variants")
    listing.add_argument(
        "--check",
        action="store_true",
        help="load each of them, and say which cannot be used and why",
    )
    model = "a directory or hub id of a transformers model; only its configuration is read"
    planning = command(
        _plan,
        "show what attach would do, without loading weights",
        model=model,
        variant="an installed variant",
    )
    planning.add_argument(
        "--targets", action="append", help="a regular expression on layer names; may be repeated"
    )
    planning.add_argument("--exclude", action="append", help="likewise, taken away again")
    planning.add_argument("--layers", type=int, nargs="+", help="indices of the repeated blocks")
    planning.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the variant"
    )
    command(_inspect, "show what a file holds, without its plugin or a model", file="of an adapter")
    command(
        _new,
        "write the package of a new variant: code to replace, tests, CI, licence",
        name="such as my-method",
    )
    variant = "an installed variant, or module:Class of a Variant or of a VariantTests"
    command(_conform, "hold a variant to every promise of the conformance suite", variant=variant)
    return parser


def _variants(options: argparse.Namespace) -> str:
    found, rows, broken = variants(), [], []
    for info in found.values():
        rows.append(f"{info.name:<18} {info.distribution} {info.version}  ({info.target})")
        if options.check:
            try:
                variant_class(info.name)
            except LoraLiteError as error:
                broken.append(info.name)
                rows.append(f"  cannot be used: {error}")
    if broken:
        print(*rows, sep="\n")
        raise LoraLiteError(
            f"{len(broken)} of {len(found)} variants cannot be used: {', '.join(broken)}"
        )
    return "\n".join(rows) or "no variant is installed; try pip install lora-lite-lora"


def _new(options: argparse.Namespace) -> str:
    folder = new(options.name, Path())
    return f"wrote {folder}; next: cd {folder} && pip install -e .[test] && pytest"


def _conform(options: argparse.Namespace) -> str:
    from lora_lite.testing.conform import conform

    return conform(options.variant, partial(print, flush=True))


def _plan(options: argparse.Namespace) -> str:
    variant = make_variant(options.variant, dict(_assignment(text) for text in options.set))
    model = _empty_model(options.model)
    return str(
        plan(
            model, variant, targets=options.targets, exclude=options.exclude, layers=options.layers
        )
    )


def _assignment(text: str) -> tuple[str, Any]:
    """`r=8` as ("r", 8): a JSON value where it is one, else text."""
    field, separator, value = text.partition("=")
    if not separator:
        raise LoraLiteError(f"--set {text}: expected FIELD=VALUE, such as --set r=8")
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


def _inspect(options: argparse.Namespace) -> str:
    header, tensors = fileformat.read(options.file)
    lines = [
        f"variant      {header.variant} (format {header.variant_format})",
        f"written by   {header.provider}, lora-lite-core {header.core}, file format {header.format}",
        f"seed, scale  {header.seed}, {header.scale:g}",
        f"tensors      {len(tensors)}, {sum(t.numel() for t in tensors.values()):,} numbers: {', '.join(header.dtypes)}",
        f"derived      {'in the file' if header.derived else 'left out; derived from the base and verified on loading'}",
        f"base         {'needed as it was' if header.uses_base else 'tensors do not depend on its weights'}",
    ]
    for fields in dict.fromkeys(header.sites.values()):
        lines += [
            f"fields       {fields}",
            *(f"  {site}" for site, own in header.sites.items() if own == fields),
        ]
    return "\n".join(lines)
