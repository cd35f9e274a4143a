"""Sweeps: the same trials for every row, the choice, and what the choice is used for."""

import json
import math
from pathlib import Path

import pytest
from lora_lite_benchmark.cli import main
from lora_lite_benchmark.config import FieldValue
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.results import load_results
from lora_lite_benchmark.sweep import Choice, Trial, choose, grid, load_choices


class Split:
    def __init__(self, loss: float) -> None:
        self.loss = loss
        self.accuracy = 0.5


class Run:
    """A result that knows its loss alone: here the distance of the rate from 0.02, in decades."""

    def __init__(self, lr: float) -> None:
        self.judged = Split(abs(math.log10(lr / 0.02)))


def run(lr: float, _fields: dict[str, FieldValue]) -> Run:
    return Run(lr)


def test_every_row_gets_the_same_trials() -> None:
    """The grid, then half and twice its best rate; the best is of the grid, told if at its edge."""
    choice = choose("lora", 0.03, (0.1, 0.3, 1, 3), {}, run)  # type: ignore[arg-type]
    assert [trial.lr for trial in choice.trials] == [0.003, 0.009, 0.03, 0.09, 0.015, 0.06]
    assert choice.chosen.lr == 0.03
    assert not choice.is_at_edge
    assert choice.loss_at(0.5) == pytest.approx(abs(math.log10(0.015 / 0.02)))
    assert choice.loss_at(7) is None
    assert choose("lora", 1.0, (0.1, 1), {}, run).is_at_edge  # type: ignore[arg-type]


def test_fields_are_varied_with_every_rate() -> None:
    """Every combination of rate and fields is one trial."""
    found = list(grid(0.01, (1, 2), {"r": [4, 8], "rslora": [True]}))
    assert found == [(lr, {"r": r, "rslora": True}) for r in (4, 8) for lr in (0.01, 0.02)]


def test_failed_trials_are_the_worst() -> None:
    """One that failed is never chosen; if all did, that is an error."""
    choice = choose("lora", 0.01, (1, 2), {}, lambda lr, _: Run(lr) if lr > 0.015 else None)  # type: ignore[arg-type,return-value]
    assert choice.chosen.lr == 0.02
    assert math.isinf(choice.trials[0].loss)
    with pytest.raises(BenchmarkError, match="all 2 trials of lora failed"):
        choose("lora", 0.01, (1, 2), {}, lambda *_: None)


def test_a_sweep_chooses_on_validation_problems_and_a_run_takes_its_choice(
    arguments: list[str], tmp_path: Path
) -> None:
    """No test problem is looked at; a second sweep repeats nothing; `run --settings` uses lr and
    fields, and says how many trials they had."""
    trials = ["--variants", "lora", "--factors", "1", "3", "--grid", "r=2,4"]
    out = ["--validation", _test_file(arguments), "--out", str(tmp_path / "sweep")]
    assert main(["sweep", *arguments, *trials, *out]) == 0
    results = load_results(tmp_path / "sweep")
    assert len(results) == 6
    assert all(result.test is None and result.validation for result in results)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("sweep/*/result.json")}
    assert main(["sweep", *arguments, *trials, *out]) == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("sweep/*/result.json")} == stamps
    choice = load_choices(tmp_path / "sweep")["lora"]
    out = ["--out", str(tmp_path / "run"), "--settings", str(tmp_path / "sweep")]
    assert main(["run", *arguments, "--variants", "lora", "--no-base", *out]) == 0
    (result,) = load_results(tmp_path / "run")
    assert result.config.lr == choice.chosen.lr
    assert result.config.fields["r"] == choice.chosen.fields["r"]
    assert result.config.trials == 6
    assert "| 6 |" in (tmp_path / "run/table.md").read_text()


def test_what_is_no_sweep_is_told(tmp_path: Path) -> None:
    """A file of another kind is named, with the command that makes one."""
    (tmp_path / "sweep.json").write_text(json.dumps({"preset": "tiny", "choices": [1]}))
    with pytest.raises(BenchmarkError, match="holds no choices of a sweep"):
        load_choices(tmp_path)
    trial = Trial(lr=0.1, fields={}, loss=1.0, accuracy=0.0)
    assert Choice(row="a", trials=(trial,), best=0, is_at_edge=False).chosen == trial


def test_without_generation_the_loss_alone_is_judged(arguments: list[str], tmp_path: Path) -> None:
    """max_new_tokens=0: nothing is generated, and no accuracy is shown anywhere."""
    out = tmp_path / "out"
    command = ["run", *arguments, "--variants", "lora:r=2", "--max-new-tokens", "0"]
    assert main([*command, "--out", str(out)]) == 0
    for result in load_results(out):
        assert result.test
        assert all(not outcome.prediction for outcome in result.test.outcomes)
    table = (out / "table.md").read_text()
    assert "test loss" in table
    assert "test %" not in table
    assert "% - lora" not in table
    assert "Test loss against trainable parameters" in (out / "report.html").read_text()


def _test_file(arguments: list[str]) -> str:
    return arguments[arguments.index("--test") + 1]
