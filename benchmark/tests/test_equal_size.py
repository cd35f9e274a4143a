"""Rows with the same number of parameters, and what runs would cost before they are started."""

import re
from collections.abc import Callable
from pathlib import Path

import lora_lite as ll
import pytest
from lora_lite_benchmark.cli import main
from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.equal_size import nearest_rank, parse_count
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.models import load_model
from lora_lite_benchmark.results import load_results
from lora_lite_benchmark.variants import adapter_arguments

Make = Callable[..., RunConfig]


@pytest.mark.parametrize(
    "row", ["lora", "dora", "hra", "antipasto", "antipasto_mix", "lokr", "vera"]
)
@pytest.mark.parametrize("wanted", [100, 700, 5_000])
def test_the_rank_comes_nearest_of_all(make_config: Make, row: str, wanted: int) -> None:
    """No rank up to 100 that fits the layers is nearer, by ratio."""
    config = make_config(row)
    model = load_model(config)

    def off(rank: int) -> float | None:
        sized = config.model_copy(update={"fields": {**config.fields, "r": rank}})
        try:
            count = ll.plan(model, config.variant, **adapter_arguments(sized)).parameters
        except ll.LoraLiteError:
            return None
        return max(count, wanted) / min(count, wanted)

    found = nearest_rank(config, wanted)
    assert found is not None
    nearest = off(found)
    assert nearest is not None
    possible = [distance for rank in range(1, 101) if (distance := off(rank)) is not None]
    assert nearest <= min(possible) * (1 + 1e-9)


def test_rows_of_one_size(arguments: list[str], tmp_path: Path) -> None:
    """The labels name the ranks; a row without a rank keeps its size."""
    rows = ["lora", "dora", "ia3"]
    out = ["--out", str(tmp_path), "--steps", "1", "--no-base"]
    assert main(["run", *arguments, *out, "--variants", *rows, "--parameters", "2.4k"]) == 0
    sizes = {run.config.label: run.measurements.parameters for run in load_results(tmp_path)}
    assert len(sizes) == 3
    assert "ia3" in sizes
    for label, size in sizes.items():
        if label != "ia3":
            assert re.fullmatch(r"(lora|dora):r=\d+", label)
            assert 2_400 / 1.5 < size < 2_400 * 1.5


@pytest.mark.parametrize(("text", "count"), [("8000", 8000), ("8k", 8000), ("1.5M", 1_500_000)])
def test_counts_are_written_as_people_write_them(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "k", "0", "-3k", "8g", "inf", "many"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(BenchmarkError, match="such as 8000, 8k"):
        parse_count(text)


def test_an_estimate_trains_nothing_and_leaves_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each row, with all of its seeds, and their sum."""
    rows = ["--variants", "lora:r=2", "full", "--lr", "0.01", "--seeds", "0", "1"]
    assert main(["run", *arguments, *rows, "--out", str(tmp_path / "out"), "--estimate"]) == 0
    printed = capsys.readouterr().out
    lines = [line.strip("| ").split(" | ") for line in printed.splitlines() if line[:1] == "|"]
    assert {line[0]: line[1] for line in lines[2:]} == {"base": "1", "lora:r=2": "2", "full": "2"}
    assert lines[2][2] == "–"
    assert float(lines[3][2]) >= 0
    assert "5 runs take about" in printed
    assert not (tmp_path / "out").exists()
