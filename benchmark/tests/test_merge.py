"""Runs of several directories as one: what belongs together, and what is refused before anything is
written.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from lora_lite_benchmark.cli import main
from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.merge import merge
from lora_lite_benchmark.results import Result, load_results
from lora_lite_benchmark.rows import group_rows
from lora_lite_benchmark.run import run_one

Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def mine(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mine")
    for row in ("base", "lora:r=2"):
        run_one(make_config(row), out)
    return out


@pytest.fixture(scope="module")
def theirs(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another row, another seed, and the same base: from a model that lies elsewhere."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "a-copy"
    shutil.copytree(make_config("base").model, elsewhere)
    out = tmp_path_factory.mktemp("theirs")
    run_one(make_config("base", model=str(elsewhere)), out)
    run_one(make_config("lora:r=2", model=str(elsewhere), seed=1), out)
    run_one(make_config("ia3", model=str(elsewhere)), out)
    return out


def test_runs_of_two_people_are_one_table(
    mine: Path, theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each run once, with its files; the seeds of a row are pooled; nobody's paths are in it. The
    directory is one that `table` and `run` take.
    """
    out = tmp_path / "both"
    assert main(["merge", str(mine), str(theirs), "--out", str(out)]) == 0
    assert "| lora:r=2 | 0 1 |" in capsys.readouterr().out
    results = load_results(out)
    assert sorted(run.config.label for run in results) == ["base", "ia3", "lora:r=2", "lora:r=2"]
    (group,) = group_rows(results)
    assert {row.config.label: row.seeds for row in group.rows}["lora:r=2"] == (0, 1)
    for run in results:
        assert run.hash == run.config.hash
        assert "/" not in run.config.model
        text = (out / run.config.folder / "result.json").read_text()
        assert str(mine.parent) not in text
        if run.config.variant != "base":
            assert (out / run.config.folder / "adapter.safetensors").is_file()
    assert main(["table", str(out)]) == 0


def test_what_does_not_belong_together_is_refused(
    mine: Path, make_config: Make, tmp_path: Path
) -> None:
    """Other steps, another number of problems: the error names setting, values and folders."""
    for settings, says in (
        ({"steps": 3}, "steps 6 in .*mine.* and 3 in"),
        ({"test": {**make_config().test.model_dump(), "count": 5}}, "test .* count=5"),
    ):
        other = tmp_path / str(len(list(tmp_path.iterdir())))
        run_one(make_config("ia3", **settings), other)
        with pytest.raises(BenchmarkError, match=says):
            merge([mine, other], tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_one_run_with_two_outcomes_is_refused(mine: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(mine, other)
    run = next(run for run in load_results(other) if run.config.variant == "lora")
    assert run.test is not None
    changed = run.test.outcomes[0].model_copy(update={"nats": 0.0})
    split = run.test.model_copy(update={"outcomes": (changed, *run.test.outcomes[1:])})
    Result.save(run.model_copy(update={"test": split}), other / run.config.folder)
    with pytest.raises(BenchmarkError, match="with other outcomes"):
        merge([mine, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(merge([mine, mine], tmp_path / "out")) == 2


def test_a_directory_that_exists_is_left_alone(mine: Path) -> None:
    with pytest.raises(BenchmarkError, match="exists"):
        merge([mine], mine)
