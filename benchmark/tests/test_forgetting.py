"""What an adapter makes its base forget: measured against the base, and on the way by its scale."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lora_lite_benchmark.cli import main
from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.data import held_out_examples
from lora_lite_benchmark.embedded import TASKS
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.figures import figures
from lora_lite_benchmark.models import load_tokenizer
from lora_lite_benchmark.results import load_results
from lora_lite_benchmark.rows import group_rows
from lora_lite_benchmark.run import run_one

Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A source of texts, in which a title and an empty line are no texts."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = ["", "A title", *(f"Number {i}: " + "what the base knows. " * 12 for i in range(6))]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), "utf-8")
    return {"path": str(path), "count": 5}


def test_forgetting_is_the_rise_of_the_loss_on_held_out_text(
    make_config: Make, texts: dict[str, Any], tmp_path: Path
) -> None:
    """Before is the base, also for full fine-tuning, which changes it; at scale 0 an adapter has
    forgotten nothing, at scale 1 it is what it is. The base's own row has nothing to forget.
    """
    settings = {"forgetting": texts, "scales": [0.0, 1.0, 2.0], "lr": 0.05}
    rows = ["base", "lora:r=2", "full"]
    runs = {row: run_one(make_config(row, **settings), tmp_path) for row in rows}
    lora, full = runs["lora:r=2"].forgetting, runs["full"].forgetting
    assert runs["base"].forgetting is None
    assert lora is not None
    assert full is not None
    assert len(lora.before) == 5
    assert full.before == lora.before
    assert full.after != full.before
    assert full.scales == ()
    losses = {at.scale: at.held_out_loss for at in lora.scales}
    assert losses[0.0] == pytest.approx(sum(lora.before) / sum(lora.tokens), rel=1e-6)
    assert losses[1.0] == pytest.approx(sum(lora.after) / sum(lora.tokens), rel=1e-6)
    assert runs["lora:r=2"].test is not None
    assert lora.scales[1].task_loss == pytest.approx(runs["lora:r=2"].test.loss, rel=1e-6)

    (group,) = group_rows(list(runs.values()))
    shown = {str(row["label"]): row["forgetting"] for row in figures(group)}
    assert shown["base"] is None
    assert shown["lora:r=2"] == pytest.approx(losses[1.0] - losses[0.0], rel=1e-5)


def test_long_texts_are_cut_and_short_ones_left_out(
    make_config: Make, texts: dict[str, Any]
) -> None:
    config = make_config("lora", forgetting=texts, max_tokens=30)
    found = held_out_examples(load_tokenizer(config), config)
    assert [len(example.ids) for example in found] == [30] * 5
    assert {example.start for example in found} == {1}


def test_a_source_without_text_is_refused(make_config: Make, tmp_path: Path) -> None:
    path = tmp_path / "titles.jsonl"
    path.write_text(json.dumps({"text": "A title"}) + "\n", "utf-8")
    config = make_config("lora", forgetting={"path": str(path)})
    with pytest.raises(BenchmarkError, match="no text of 200 letters"):
        run_one(config, tmp_path / "out")


def test_models_of_ones_own_take_text_of_ones_own(
    arguments: list[str], texts: dict[str, Any], tmp_path: Path
) -> None:
    """The preset's text is of its own model: with another model it is left out unless given."""
    row = ["--variants", "lora:r=2", "--no-base"]
    assert main(["run", *arguments, *row, "--out", str(tmp_path / "without")]) == 0
    given = ["--forgetting", texts["path"], "--scales", "0.5"]
    assert main(["run", *arguments, *row, *given, "--out", str(tmp_path / "with")]) == 0
    (without,), (with_text,) = load_results(tmp_path / "without"), load_results(tmp_path / "with")
    assert without.forgetting is None
    assert with_text.forgetting is not None
    assert [at.scale for at in with_text.forgetting.scales] == [0.5]
    assert "forgetting" in (tmp_path / "with" / "table.md").read_text()


@pytest.mark.parametrize("name", sorted(TASKS))
def test_home_problems_are_not_those_of_the_task(name: str) -> None:
    """They are as many as asked for, differ from one another, and none is tested or trained on."""
    task = TASKS[name]
    home = [row["question"] for row in task.home(200)]
    assert len(set(home)) == 200
    assert not set(home) & {row["question"] for row in task.test()}
    assert not set(home) & {row["query"] for row in task.train(2_000)}
