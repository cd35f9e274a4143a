"""The table compares rows on the same questions, and says what that cannot tell apart."""

import re
from collections.abc import Callable

import pytest
from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.results import Result
from lora_lite_benchmark.run import run_one
from lora_lite_benchmark.table import format_table, separated_by_loss_alone


@pytest.fixture(scope="module")
def results(make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """Rows of a random model that gets nothing right: the losses alone differ."""
    out = tmp_path_factory.mktemp("out")
    configs = [make_config(row, lr=lr) for row, lr in (("base", 0.0), ("lora", 0.03), ("lora:r=2", 0.001))]
    return [run_one(config, out) for config in configs]


def cells(table: str) -> dict[str, dict[str, str]]:
    """Each row's cells by column, by the row's name."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}


def test_rows_are_compared_with_lora_on_the_same_questions(results: list[Result]) -> None:
    """Without a right answer nothing is separable by accuracy; the losses are. The reference has no difference to itself."""
    found = cells(format_table(results))
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
    assert [set(pair) for pair in separated_by_loss_alone(results)] == [{"lora", "lora:r=2"}]
    assert "and the paired loss does: 1; lora" in format_table(results)


def test_without_a_reference_nothing_is_compared(results: list[Result]) -> None:
    others = [result for result in results if result.config.label != "lora"]
    assert " - lora" not in format_table(others)
