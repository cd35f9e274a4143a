"""The model card of an adapter: base, method, fields, layers, figures, and how to load it.

Its head is YAML, in which every text is written as JSON, which YAML reads.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_lite.adapter_text import layer_counts
from lora_lite.errors import AdapterError, printable
from lora_lite.plugins import CORE, provider

if TYPE_CHECKING:
    from lora_lite.adapter import Adapter

Results = Mapping[str, object] | str | os.PathLike[str] | None

# The hub's name of the library that loads what a format writes.
LIBRARIES = {None: "lora-lite", "peft": "peft", "merged": "transformers"}


def model_card(adapter: "Adapter", repo_id: str, format: str | None, results: Results) -> str:  # noqa: A002
    """The text of README.md.

    Raises:
        AdapterError: the results are neither figures by name nor the folder of a run.
    """
    base = base_id(adapter)
    variants = list(dict.fromkeys(adapter.sites.values()))
    parts = [
        *_head(base, sorted({variant.name for variant in variants}), format),
        "",
        f"# {repo_id.rpartition('/')[2]}",
        "",
        f"{_what(format)} of {_named(base)}, made with lora-lite.",
        "",
        "| | |",
        "|---|---|",
        f"| base | {_named(base)} |",
        *(f"| method | {_cell(str(variant))} |" for variant in variants),
        f"| layers | {_cell(layer_counts(adapter))} |",
        f"| trainable parameters | {adapter.num_parameters:,} |",
        f"| scale | {adapter.scale:g} |",
        "",
        "## Use",
        "",
        *_use(base or "BASE", repo_id, format, variants),
        *_results(figures(results)),
    ]
    return "\n".join(parts) + "\n"


def base_id(adapter: "Adapter") -> str:
    """The base's id on the hub; "" if it is not known, or a folder on this machine."""
    config: Any = getattr(adapter._root, "config", None)
    name = getattr(config, "name_or_path", None) or ""
    is_id = isinstance(name, str) and name.count("/") <= 1 and not os.path.exists(name)
    return name if is_id else ""


def figures(results: Results) -> dict[str, str]:
    """Results as text by name.

    Raises:
        AdapterError: they are neither figures by name nor the folder of a run of the benchmark.
    """
    if results is None:
        return {}
    if isinstance(results, Mapping):
        return {str(name): _figure(value) for name, value in results.items()}
    if isinstance(results, str | os.PathLike) and (Path(results) / "result.json").is_file():
        return _of_benchmark(Path(results))
    raise AdapterError(
        f"results={results!r} is neither {{name: figure}} nor the folder of a run",
        expected="A run of lora-lite-bench leaves a folder with a result.json",
    )


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _of_benchmark(folder: Path) -> dict[str, str]:
    """The figures of a run of lora-lite-bench, from its record."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        config, judged = result["config"], result["test"] or result["validation"]
        correct = [outcome["correct"] for outcome in judged["outcomes"]]
        return {
            "benchmark": f"preset {config['preset']}, row {config['label']}",
            "trained on": f"{config['train']['path']}, {config['steps']} steps, seed "
            f"{config['seed']}",
            "right answers": f"{sum(correct)} of {len(correct)}",
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{folder / 'result.json'} is not the record of a finished run of lora-lite-bench: "
            f"{type(error).__name__}: {error}"
        ) from None


# --- its parts


def _head(base: str, names: list[str], format: str | None) -> list[str]:  # noqa: A002
    library = LIBRARIES.get(format, "lora-lite")
    relation = "merge" if format == "merged" else "adapter"
    described = [f"base_model: {json.dumps(base)}", f"base_model_relation: {relation}"]
    tags = [f"- {json.dumps(tag)}" for tag in ("lora-lite", *names)]
    return ["---", *(described if base else []), f"library_name: {library}", "tags:", *tags, "---"]


def _what(format: str | None) -> str:  # noqa: A002
    return "A whole checkpoint with an adapter merged" if format == "merged" else "An adapter"


def _named(base: str) -> str:
    return f"[{base}](https://huggingface.co/{base})" if base else "a base that is not on the hub"


def _cell(text: str) -> str:
    """Text for a cell of a table, which is one line."""
    return printable(text).replace("|", "\\|").replace("\n", " ")


def _use(base: str, repo_id: str, format: str | None, variants: list[Any]) -> list[str]:  # noqa: A002
    model = "from transformers import AutoModelForCausalLM"
    if format == "merged":
        return [
            *("```python", model, ""),
            *(f"model = AutoModelForCausalLM.from_pretrained({repo_id!r})", "```"),
        ]
    packages = {CORE, *(provider(type(variant))[0] for variant in variants)} - {""}
    if format is not None:
        packages.add(f"lora-lite-{format}")
    return [
        *("```sh", f"pip install {' '.join(sorted(packages))}", "```", ""),
        *("```python", "import lora_lite as ll", model, ""),
        f"model = AutoModelForCausalLM.from_pretrained({base!r})",
        *(f"adapter = ll.load(model, {repo_id!r})", "```"),
    ]


def _results(results: Mapping[str, str]) -> list[str]:
    if not results:
        return []
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in results.items()]
    return ["", "## Results", "", "| | |", "|---|---|", *rows]
