"""The command, from options to files: what a user does, on a random model."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import lora_lite as ll
import pytest
import torch
from lora_lite_benchmark.cli import TABLE_FILES, main
from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.embedded import TASKS
from lora_lite_benchmark.models import load_model
from lora_lite_benchmark.results import Result, load_results
from lora_lite_benchmark.run import run_one

Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def finished(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The out directory of a run with an adapter, full fine-tuning, and the base."""
    out = tmp_path_factory.mktemp("out")
    assert (
        main(
            ["run", *arguments, "--out", str(out), "--variants", "lora:r=2", "full", "--lr", "0.01"]
        )
        == 0
    )
    return out


def test_a_run_leaves_results_table_and_picture(finished: Path) -> None:
    """One JSON file a row with config, versions, every outcome and the curve; the adapter; a table;
    a PNG.
    """
    results = {result.config.label: result for result in load_results(finished)}
    assert results.keys() == {"base", "lora:r=2", "full"}
    lora = results["lora:r=2"]
    assert lora.test is not None
    assert len(lora.test.outcomes) == 13
    assert [point.step for point in lora.curve] == list(range(6))
    assert {
        "python",
        "torch",
        "transformers",
        "lora-lite-core",
        "lora-lite-lora",
    } <= lora.versions.keys()
    assert lora.config.fields["r"] == 2
    assert lora.measurements.calibration_s is None
    assert lora.hash == lora.config.hash
    assert results["base"].curve == ()
    assert results["base"].measurements.file_bytes is None
    assert (finished / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    table = (finished / "table.md").read_text()
    assert [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")][1:] == [
        "| base",
        "| lora:r=2",
        "| full",
    ]
    leftovers = {path.name for path in finished.glob("*/*")} - {
        "result.json",
        "adapter.safetensors",
    }
    assert leftovers == set()


def test_measurements_are_the_adapters(finished: Path) -> None:
    """Parameters, MACs and file size are the planned ones and the file's; times and memory are
    there.
    """
    lora = next(result for result in load_results(finished) if result.config.variant == "lora")
    plan = ll.plan(load_model(lora.config), "lora", r=2, targets=lora.config.targets)
    measured = lora.measurements
    assert (measured.parameters, measured.macs_per_token) == (plan.parameters, plan.macs_per_token)
    assert (
        measured.file_bytes
        == (finished / lora.config.folder / "adapter.safetensors").stat().st_size
    )
    assert measured.forward_ms > 0
    assert measured.backward_ms is not None
    assert measured.backward_ms > 0
    assert measured.init_s is not None
    assert measured.init_s > 0
    assert measured.peak_memory_bytes > 10_000_000


def test_training_lowers_the_loss(finished: Path) -> None:
    """Even six steps bring the reference answers nearer, and full fine-tuning further than the
    base.
    """
    losses = {
        result.config.variant: result.test.loss for result in load_results(finished) if result.test
    }
    assert losses["full"] < losses["lora"] < losses["base"]


def test_a_complete_run_is_not_repeated(
    finished: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command again trains nothing, and says the same."""
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*/*")}
    assert (
        main(
            [
                "run",
                *arguments,
                "--out",
                str(finished),
                "--variants",
                "lora:r=2",
                "full",
                "--lr",
                "0.01",
            ]
        )
        == 0
    )
    assert {path: path.stat().st_mtime_ns for path in finished.glob("*/*")} == before
    assert "lora:r=2 (seed 0)" in capsys.readouterr().out


def test_the_table_is_made_again_from_the_files(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`table` prints what `run` wrote, in every format; `plot` and `report` write where they are
    told.
    """
    for name, file in TABLE_FILES.items():
        assert main(["table", str(finished), "--format", name]) == 0
        assert capsys.readouterr().out == (finished / file).read_text()
    assert main(["report", str(finished), "--to", str(finished / "again.html")]) == 0
    assert (finished / "again.html").read_text() == (finished / "report.html").read_text()
    (finished / "again.html").unlink()
    assert main(["plot", str(finished), "--to", str(finished / "again.png")]) == 0
    assert (finished / "again.png").read_bytes().startswith(b"\x89PNG")
    (finished / "again.png").unlink()


def test_the_saved_adapter_is_the_trained_one(finished: Path) -> None:
    """Every trained row was reloaded and gave the same bits; a file that does not is an error, not
    a row.
    """
    results = load_results(finished)
    assert {result.config.variant: result.reloaded_identical for result in results} == {
        "base": None,
        "lora": True,
        "full": True,
    }

    from accelerate import Accelerator
    from lora_lite_benchmark.data import Example, collate
    from lora_lite_benchmark.errors import BenchmarkError
    from lora_lite_benchmark.verify import logits, reload_agrees

    lora = next(result for result in results if result.config.variant == "lora")
    batch = collate([Example([5, 6, 7, 1], 2), Example([8, 1], 1)], pad=0)
    path = finished / lora.config.folder / "adapter.safetensors"
    model = load_model(lora.config)
    ll.load(model, path)
    trained = logits(model, batch)
    alone = Accelerator(cpu=True)
    assert reload_agrees(lora.config, path, batch, trained, alone)
    other = torch.nextafter(trained, trained + 1)
    with pytest.raises(BenchmarkError, match="gives logits that differ by up to"):
        reload_agrees(lora.config, path, batch, other, alone)


def test_a_damaged_result_is_named(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A result file that cannot be read is an error with its path, never a row with holes."""
    shutil.copytree(finished, tmp_path / "copy")
    path = next((tmp_path / "copy").glob("lora-*/result.json"))
    data = json.loads(path.read_text())
    data["measurements"]["parameters"] = "many"
    path.write_text(json.dumps(data))
    assert main(["table", str(tmp_path / "copy")]) == 2
    assert str(path) in capsys.readouterr().err


def test_seeds_are_runs(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each seed is a run of its own, with its own start values; the table has one row for them."""
    options = [
        "run",
        *arguments,
        "--out",
        str(tmp_path),
        "--no-base",
        "--variants",
        "lora",
        "--seeds",
        "0",
        "1",
    ]
    assert main([*options, "--steps", "2", "--test-count", "2"]) == 0
    files = [path.read_bytes() for path in tmp_path.glob("*/adapter.safetensors")]
    assert len(set(files)) == 2
    out = capsys.readouterr().out
    assert "2 steps of 4, seeds 0 1\n" in out
    assert out.count("\n| lora |") == 1


def test_runs_are_repeatable(make_config: Make, tmp_path: Path) -> None:
    """The same config in another directory gives the same outcomes and the same file's bytes."""
    config = make_config("lora:dropout=0.1", steps=3)
    one, two = run_one(config, tmp_path / "one"), run_one(config, tmp_path / "two")
    assert isinstance(one, Result)
    assert (one.test, one.curve) == (two.test, two.curve)
    one_file, two_file = (
        tmp_path / name / config.folder / "adapter.safetensors" for name in ("one", "two")
    )
    assert one_file.read_bytes() == two_file.read_bytes()


def test_calibration_reaches_a_variant_that_asks_for_it(make_config: Make, tmp_path: Path) -> None:
    """AntiPaSTO choosing its directions by activations gets training rows, and is trained like the
    others.
    """
    config = make_config("antipasto:r=8,select=activation", steps=2)
    result = run_one(config, tmp_path)
    assert result.reloaded_identical
    assert result.measurements.slim_file_bytes is None
    assert result.measurements.calibration_s is not None
    assert result.measurements.calibration_s > 0
    assert result.measurements.init_s is not None
    assert result.measurements.init_s > 0


def test_several_presets_make_a_table_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The embedded tasks side by side: each table says what its task measures, and so does the
    page.
    """
    small = ["--steps", "2", "--batch-size", "4", "--train-count", "8", "--test-count", "4"]
    small += ["--max-new-tokens", "4", "--variants", "lora:r=1", "--out", str(tmp_path)]
    assert main(["run", "--preset", "tiny", "skill", *small]) == 0
    printed = capsys.readouterr().out
    assert "**tiny**, tested on 4 problems of tiny" in printed
    assert "**skill**, tested on 4 problems of skill" in printed
    page = (tmp_path / "report.html").read_text()
    for task in TASKS.values():
        assert task.measures in printed
        assert task.measures in page


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """`presets` shows names, descriptions, and the settings of every row."""
    assert main(["presets"]) == 0
    out = capsys.readouterr().out
    assert "tiny: " in out
    assert "qwen3.5-0.8b: " in out
    assert "lora " in out


def test_real_gsm8k_through_the_same_commands(model_dir: Path, tmp_path: Path) -> None:
    """GSM8K as published trains and tests a model from its own columns, with the prompt of the
    full-size preset.
    """
    folder = os.environ.get("LORA_LITE_GSM8K")
    if not folder:
        pytest.skip(
            "LORA_LITE_GSM8K is not set: it names a folder with GSM8K's train.jsonl and test.jsonl"
        )
    data = [
        f"--{split}={Path(folder) / name}.jsonl"
        for split, name in (("train", "train"), ("validation", "train"), ("test", "test"))
    ]
    counts = ["--train-count", "64", "--validation-count", "4", "--test-count", "8"]
    small = [
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--max-new-tokens",
        "4",
        "--dtype",
        "float32",
        "--max-tokens",
        "1024",
    ]
    options = [
        "--preset",
        "qwen3.5-0.8b",
        "--model",
        str(model_dir),
        "--variants",
        "lora:r=2",
        "--out",
        str(tmp_path),
    ]
    assert main(["run", *options, *data, *counts, *small]) == 0
    lora = next(result for result in load_results(tmp_path) if result.config.variant == "lora")
    assert "Think step by step." in lora.config.prompt
    assert lora.test is not None
    assert lora.validation is not None
    references = [outcome.reference for outcome in (*lora.validation.outcomes, *lora.test.outcomes)]
    assert references == [
        "72",
        "10",
        "5",
        "42",
        "18",
        "3",
        "70000",
        "540",
        "20",
        "64",
        "260",
        "160",
    ]
