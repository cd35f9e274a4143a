"""Rows of PEFT's implementation: that they start as ours, see the same data, and learn the same."""

from collections.abc import Callable
from pathlib import Path

import pytest
from lora_lite import LoraLiteError
from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.figures import figures
from lora_lite_benchmark.rows import group_rows
from lora_lite_benchmark.run import run_one
from lora_lite_benchmark.table import make_tables

Make = Callable[..., RunConfig]

NATIVE = [
    "c3a:block_size=16", "delora:r=2,start=zero_b", "dora:r=2", "hira:r=2", "hra:r=2", "ia3",
    "ia3_ff", "loha:r=2", "lokr:r=2", "lora:r=2,alpha=3", "lora_bias:r=2", "miss:r=2",
    "oft", "road:group_size=16", "shira:r=2",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # those of PEFT
@pytest.mark.parametrize("row", NATIVE)
def test_peft_learns_what_we_learn(make_config: Make, row: str, tmp_path: Path) -> None:
    """The same number of parameters, and training losses that are apart by rounding alone: without
    weight decay, which the two apply to different tensors. The saved folder gives the same bits.
    """
    same = {"targets": ["down_proj$"], "steps": 4, "lr": 0.01, "weight_decay": 0.0}
    ours = run_one(make_config(row, **same), tmp_path)
    theirs = run_one(make_config(f"peft:{row}", **same), tmp_path)
    assert theirs.config.folder.startswith(f"peft-{ours.config.variant}-")
    assert theirs.measurements.parameters == ours.measurements.parameters
    assert [point.loss for point in theirs.curve] == pytest.approx(
        [point.loss for point in ours.curve], rel=2e-5
    )
    assert theirs.curve[-1].loss != theirs.curve[0].loss
    assert theirs.reloaded_identical
    assert theirs.versions["peft"]


def test_the_table_compares_the_two(make_config: Make, tmp_path: Path) -> None:
    """The row of PEFT's is compared with ours of the same fields, and with no other."""
    rows = ["base", "lora:r=2", "lora:r=4", "peft:lora:r=2"]
    (group,) = group_rows([run_one(make_config(row), tmp_path) for row in rows])
    labels = {str(row["label"]): row for row in figures(group)}
    assert labels["peft:lora:r=2"]["curve_minus_lora_lite"] == pytest.approx(0, abs=1e-5)
    assert labels["peft:lora:r=2"]["loss_minus_lora_lite"] == pytest.approx(0, abs=1e-5)
    assert labels["lora:r=2"]["curve_minus_lora_lite"] is None
    assert labels["lora:r=4"]["loss_minus_lora_lite"] is None
    (table,) = make_tables([run for row in group.rows for run in row.runs])
    assert "curve - lora-lite" in table.header


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("peft:antipasto", "PEFT has no type that computes what 'antipasto' does"),
        ("peft:delora", "PEFT has no type that computes what 'delora' does with these fields"),
        ("peft:full", "'full' has no adapter that PEFT could compute"),
        ("peft:lorra", "lorra"),
    ],
)
def test_what_peft_does_not_compute_is_refused_before_anything_runs(
    make_config: Make, row: str, says: str
) -> None:
    with pytest.raises(LoraLiteError, match=says):
        make_config(row, lr=0.01)


def test_a_row_without_peft_says_what_to_install(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(BenchmarkError, match=r"pip install 'lora-lite-benchmark\[peft\]'"):
        make_config("peft:lora")


def test_settings_that_came_later_leave_older_hashes_alone(make_config: Make) -> None:
    """A result from before there was a choice of implementation is still that of its config."""
    config = make_config("lora")
    assert "implementation" not in config.identity
    assert config.model_copy(update={"implementation": "peft"}).hash != config.hash
