"""The command `lora-lite`: variants, plan, inspect, new, conform."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_lite import fileformat
from lora_lite.errors import LoraLiteError
from lora_lite.new import new
from lora_lite.plugins import make_variant, variant_class, variants
from lora_lite.targets import plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or 1 after a message on standard error."""
    options = _parser().parse_args(arguments)
    try:
        print(options.run(options))
    except LoraLiteError as error:
        print(f"lora-lite: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lora-lite", description="Adapters for PyTorch models.")
    commands = parser.add_subparsers(required=True, metavar="command")
    listing = commands.add_parser("variants", help="list the installed variants")
    listing.add_argument("--check", action="store_true", help="load each of them, and say which cannot be used and why")
    listing.set_defaults(run=_variants)
    planning = commands.add_parser("plan", help="show what attach would do, without loading weights")
    planning.add_argument("model", help="a directory or hub id of a transformers model; only its configuration is read")
    planning.add_argument("variant", help="an installed variant")
    planning.add_argument("--targets", action="append", help="a regular expression on layer names; may be repeated")
    planning.add_argument("--exclude", action="append", help="likewise, taken away again")
    planning.add_argument("--layers", type=int, nargs="+", help="indices of the repeated blocks")
    planning.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the variant")
    planning.set_defaults(run=_plan)
    inspecting = commands.add_parser("inspect", help="show what a file holds, without its plugin or a model")
    inspecting.add_argument("file")
    inspecting.set_defaults(run=_inspect)
    beginning = commands.add_parser("new", help="write the package of a new variant: code to replace, tests, CI, licence")
    beginning.add_argument("name", help="such as my-method")
    beginning.set_defaults(run=_new)
    conforming = commands.add_parser("conform", help="hold a variant to every promise of the conformance suite")
    conforming.add_argument("variant", help="an installed variant, or module:Class of a Variant or of a VariantTests")
    conforming.set_defaults(run=_conform)
    return parser


def _variants(options: argparse.Namespace) -> str:
    rows = {i.name: f"{i.name:<18} {i.distribution} {i.version}  ({i.target})" for i in variants().values()}
    broken = _broken(rows) if options.check else {}
    table = "\n".join(f"{row}\n  cannot be used: {broken[name]}" if name in broken else row for name, row in rows.items())
    if broken:
        print(table)
        raise LoraLiteError(f"{len(broken)} of {len(rows)} variants cannot be used: {', '.join(broken)}")
    return table or "no variant is installed; try pip install lora-lite-lora"


def _broken(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            variant_class(name)
        except LoraLiteError as error:
            found[name] = str(error)
    return found


def _new(options: argparse.Namespace) -> str:
    folder = new(options.name, Path())
    return f"wrote {folder}; next: cd {folder} && pip install -e .[test] && pytest"


def _conform(options: argparse.Namespace) -> str:
    try:
        from lora_lite.testing.conform import conform
    except ImportError as error:
        raise LoraLiteError(f"the conformance suite needs {error.name}; pip install lora-lite-core[testing]") from None
    return conform(options.variant, partial(print, flush=True))


def _plan(options: argparse.Namespace) -> str:
    variant = make_variant(options.variant, dict(_assignment(text) for text in options.set))
    model = _empty_model(options.model)
    return str(plan(model, variant, targets=options.targets, exclude=options.exclude, layers=options.layers))


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
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise LoraLiteError("lora-lite plan reads models with transformers; pip install transformers") from None
    try:
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise LoraLiteError(f"{name} cannot be read as a causal language model of transformers: {error}") from None
    return model


def _inspect(options: argparse.Namespace) -> str:
    header, tensors = fileformat.read_metadata(options.file)
    lines = [
        f"variant      {header.variant} (format {header.variant_format})",
        f"written by   {header.provider}, lora-lite-core {header.core}, file format {header.format}",
        f"seed, scale  {header.seed}, {header.scale:g}",
        f"tensors      {len(tensors)}, {sum(math.prod(shape) for _, shape in tensors.values()):,} numbers",
        f"dtypes       {', '.join(f'{name} {dtype}' for name, found in header.dtypes.items() for dtype in found)}",
        f"derived      {'in the file' if header.derived else 'left out; derived from the base and verified on loading'}",
        f"base         {'needed as it was' if header.uses_base else 'tensors do not depend on its weights'}",
    ]
    for number, configuration in enumerate(header.configurations):
        sites = [site for site, index in header.sites.items() if index == number]
        lines += [f"fields       {configuration}", *(f"  {site}" for site in sites)]
    return "\n".join(lines)
