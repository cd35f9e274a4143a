"""The finished runs of several directories, of several machines or people, as one directory.

    lora-lite-bench merge mine theirs --out both

Runs belong together if those of one preset share what every row of it shares: the model, the
problems, the steps, … Learning rates, fields and seeds may differ. Nothing is written before all is
checked. The paths of local models and problems are left behind: their digests identify them.
"""

import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_lite_benchmark.config import SOURCES, RunConfig
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.results import Result, load_results
from lora_lite_benchmark.rows import COMPARABLE

__all__ = ["merge"]

SHARED = COMPARABLE | {
    "train",
    "steps",
    "batch_size",
    "warmup",
    "weight_decay",
    "clip_norm",
    "max_tokens",
    "calibration_rows",
}
"""The settings that every row of a preset shares."""


def merge(folders: Sequence[Path], out: Path) -> list[Result]:
    """Copy the runs of `folders` to `out`, and return their results.

    Raises:
        BenchmarkError: `out` exists, a folder has no finished run, two of them have the same run
            with other outcomes, or their runs do not belong together.
    """
    if out.exists():
        raise BenchmarkError(f"{out} exists", fix="Name a directory that is not there yet")
    found = {folder: load_results(folder) for folder in folders}
    _refuse_mixture(found)
    runs = _each_once(found)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        whole = Path(temporary, out.name)
        merged = [_copy(result, folder, whole) for folder, result in runs]
        whole.rename(out)
    return merged


def _refuse_mixture(found: Mapping[Path, Iterable[Result]]) -> None:
    """Compare the settings that rows share, preset by preset, folder by folder."""
    first: dict[str, tuple[Path, dict[str, set[str]]]] = {}
    for folder, results in found.items():
        for preset, settings in _settings(results).items():
            other, theirs = first.setdefault(preset, (folder, settings))
            for name in settings.keys() & theirs.keys():
                if settings[name] != theirs[name]:
                    raise BenchmarkError(
                        f"runs of preset {preset!r} have {name} {_listed(theirs[name])} in {other} "
                        f"and {_listed(settings[name])} in {folder}",
                        expected="Rows can be compared if they share it",
                        fix="Merge directories whose runs were given the same options",
                    )


def _settings(results: Iterable[Result]) -> dict[str, dict[str, set[str]]]:
    """For each preset, the values of the shared settings. The base has none of training."""
    found: dict[str, dict[str, set[str]]] = {}
    for result in results:
        settings = found.setdefault(result.config.preset, {})
        for name, value in result.config.identity.items():
            if name in SHARED:
                settings.setdefault(name, set()).add(_text(value))
    return found


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={each}" for key, each in value.items() if each is not None)
    return repr(value)


def _listed(values: set[str]) -> str:
    return " and ".join(sorted(values))


def _each_once(found: Mapping[Path, Iterable[Result]]) -> list[tuple[Path, Result]]:
    """Every run once, with the folder that it is in."""
    runs: dict[str, tuple[Path, Result]] = {}
    for folder, results in found.items():
        for result in results:
            name = result.config.folder
            other, known = runs.setdefault(name, (folder, result))
            if (known.test, known.validation) != (result.test, result.validation):
                raise BenchmarkError(
                    f"the run {name} is in {other} and in {folder}, with other outcomes",
                    expected="A run that was repeated elsewhere may differ in its last digits",
                    fix="Delete one of the two",
                )
    return list(runs.values())


def _copy(result: Result, folder: Path, out: Path) -> Result:
    """Copy one run with its files. Its result forgets where local files lay."""
    target = out / result.config.folder
    shutil.copytree(
        folder / result.config.folder, target, ignore=shutil.ignore_patterns(".*", "error.txt")
    )
    merged = result.model_copy(update={"config": _without_places(result.config)})
    merged.save(target)
    return merged


def _without_places(config: RunConfig) -> RunConfig:
    """The same config, in which a local file or directory is a name."""
    changes: dict[str, Any] = {}
    if config.model_sha256:
        changes["model"] = Path(config.model).name
    for name in SOURCES:
        source = getattr(config, name)
        if source is not None and source.sha256:
            changes[name] = source.model_copy(update={"path": Path(source.path).name})
    return config.model_copy(update=changes)
