"""The table pools seeds, compares rows on the same questions, and says what cannot be told apart.

It comes in three formats.
"""

import csv
import io
import json
import re
from collections.abc import Callable

import pytest
from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.families import separated_by_loss_alone
from lora_lite_benchmark.results import Result
from lora_lite_benchmark.rows import group_rows
from lora_lite_benchmark.run import run_one
from lora_lite_benchmark.table import make_tables, to_csv, to_json, to_markdown


@pytest.fixture(scope="module")
def results(
    make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> list[Result]:
    """Rows of a random model that gets nothing right: the losses alone differ."""
    out = tmp_path_factory.mktemp("out")
    configs = [
        make_config(row, lr=lr) for row, lr in (("base", 0.0), ("lora", 0.03), ("lora:r=2", 0.001))
    ]
    return [run_one(config, out) for config in configs]


@pytest.fixture(scope="module")
def seeds(
    make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> list[Result]:
    """The base, and two rows of which one has two seeds."""
    out = tmp_path_factory.mktemp("seeds")
    configs = [
        make_config("base"),
        *(make_config("lora", lr=0.03, seed=seed) for seed in (0, 1)),
        make_config("lora:r=2", seed=1),
    ]
    return [run_one(config, out) for config in configs]


def cells(table: str) -> dict[str, dict[str, str]]:
    """Each row's cells by column, by the row's name."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}


def test_rows_are_compared_with_lora_on_the_same_questions(results: list[Result]) -> None:
    """Without a right answer nothing is separable by accuracy; the losses are. The reference has no
    difference to itself.
    """
    found = cells(to_markdown(make_tables(results)))
    assert found["lora"]["% - lora"] == "–"
    assert {found[name]["% - lora"] for name in ("base", "lora:r=2")} == {"+0.0 [+0.0, +0.0] ≈"}
    by_label = {result.config.label: result.test for result in results}
    for name in ("base", "lora:r=2"):
        value, low, high = map(float, re.findall(r"[-+][\d.]+", found[name]["loss - lora"]))
        mine, reference = by_label[name], by_label["lora"]
        assert mine is not None
        assert reference is not None
        assert value == pytest.approx(mine.loss - reference.loss, abs=1e-4)
        assert low <= value <= high


def test_pairs_that_only_the_loss_separates_are_named(results: list[Result]) -> None:
    assert [set(pair) for pair in separated_by_loss_alone(group_rows(results)[0])] == [
        {"lora", "lora:r=2"}
    ]
    assert "and the accuracy leaves open (1): lora" in to_markdown(make_tables(results))


def test_without_a_reference_nothing_is_compared(results: list[Result]) -> None:
    others = [result for result in results if result.config.label != "lora"]
    assert " - lora" not in to_markdown(make_tables(others))


def test_seeds_are_one_row(seeds: list[Result]) -> None:
    """A row's figures are means over its seeds, its costs medians; a difference is taken over the
    seeds that both rows have.
    """
    (table,) = make_tables(seeds)
    found = cells(to_markdown([table]))
    assert {label: row["seeds"] for label, row in found.items()} == {
        "base": "–",
        "lora": "0 1",
        "lora:r=2": "1",
    }
    lora = [result for result in seeds if result.config.label == "lora"]
    figures = next(row for row in table.figures if row["label"] == "lora")
    losses = [result.test.loss for result in lora if result.test]
    assert figures["test_loss"] == pytest.approx(sum(losses) / 2)
    assert figures["forward_ms"] in {result.measurements.forward_ms for result in lora}
    other = next(row for row in table.figures if row["label"] == "lora:r=2")
    assert other["loss_minus_lora"] == pytest.approx(seeds[3].test.loss - losses[1])
    assert "medians over the seeds" in table.footnote


def test_the_order_of_the_runs_changes_nothing(seeds: list[Result]) -> None:
    assert to_json(make_tables(seeds)) == to_json(make_tables(seeds[::-1]))


def test_equal_seeds_are_said_once(seeds: list[Result]) -> None:
    """If all rows have the same seeds, the title names them and there is no column for them."""
    (table,) = make_tables(seeds[:3])
    assert "seeds" not in table.header
    assert table.title.endswith("steps of 4, seeds 0 1")


def test_csv_and_json_hold_the_same_figures_in_full(seeds: list[Result]) -> None:
    """Every row under the same names, every digit; nothing where a figure does not apply."""
    tables = make_tables(seeds)
    from_json = [row for table in json.loads(to_json(tables)) for row in table["rows"]]
    from_csv = list(csv.DictReader(io.StringIO(to_csv(tables))))
    assert from_json == [dict(row) for table in tables for row in table.figures]
    assert [
        {name: "" if value is None else str(value) for name, value in row.items()}
        for row in from_json
    ] == from_csv
    base = from_json[0]
    assert base["label"] == "base"
    assert base["lr"] is None
    assert base["backward_ms"] is None
    assert base["test_loss"] == pytest.approx(seeds[0].test.loss, rel=1e-12)


def test_every_row_has_a_sentence_to_quote(results: list[Result]) -> None:
    """With the figures of the row: its loss where nothing is right, its difference, its p."""
    (table,) = make_tables(results)
    rows = {row["label"]: row for row in table.figures}
    other, lora = rows["lora:r=2"], rows["lora"]
    assert f"p = {other['accuracy_minus_lora_p']:.3f} among 2 comparisons" in str(other["sentence"])
    assert f"{other['parameters']:,} parameters" in str(other["sentence"])
    assert f"{other['step_ratio']:.2f} times the base's step" in str(other["sentence"])
    assert "than lora" not in str(lora["sentence"])
    assert str(rows["base"]["sentence"]).startswith("The base solves 0.0 %")
