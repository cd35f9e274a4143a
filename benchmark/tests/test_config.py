"""What a run is: presets, overrides, and the hash that names it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lora_lite import LoraLiteError
from lora_lite_benchmark.config import RunConfig, Source
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.models import load_model
from lora_lite_benchmark.preset import Preset, parse_row, resolve

Make = Callable[..., RunConfig]


def test_a_config_survives_json(make_config: Make) -> None:
    """The config in a result file is the one that was run: nothing is lost, and it has the same
    hash.
    """
    config = make_config("lora:r=2", targets=["q_proj$", "v_proj$"], layers=[0])
    again = RunConfig.model_validate_json(config.model_dump_json())
    assert again == config
    assert again.hash == config.hash


def test_every_default_is_spelt_out(make_config: Make) -> None:
    """A later change of a variant's defaults cannot change what a recorded config means: its fields
    are all there.
    """
    fields = make_config("lora").fields
    assert {"r", "alpha", "rslora", "dropout"} <= fields.keys()


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"steps": 7},
        {"lr": 0.1},
        {"prompt": "{question}"},
        {"targets": ["q_proj$"]},
        {"dtype": "bfloat16"},
    ],
)
def test_the_hash_follows_what_matters(make_config: Make, change: dict[str, Any]) -> None:
    """Another setting is another run, with a folder of its own."""
    assert make_config(**change).hash != make_config().hash


def test_the_hash_of_a_config_never_changes() -> None:
    """Results on disk are found by this hash: a config of version 0.1 must keep it for ever."""
    config = RunConfig(
        preset="p",
        label="lora:r=4",
        model="somewhere/a-model",
        train=Source(path="a.jsonl", sha256="1" * 64),
        test=Source(path="tiny", split="test", count=5),
        variant="lora",
        fields={"r": 4, "alpha": 8.0, "rslora": True},
        targets=("down_proj$",),
        layers=(2, 3),
        steps=10,
        lr=0.01,
    )
    assert config.hash == "149e224f8863"
    assert config.model_copy(update={"variant": "base"}).hash == "a00e6b21e54c"


def test_the_hash_ignores_what_does_not_matter(make_config: Make) -> None:
    """How often a checkpoint is written, and how a row is spelt, make no other run."""
    assert make_config(checkpoint_every=1).hash == make_config().hash
    assert make_config("lora:r=8").hash == make_config("lora").hash
    assert make_config("lora:r=4").hash != make_config("lora").hash


def test_the_base_is_one_run_whatever_the_training(make_config: Make) -> None:
    """The untrained model is tested once, not once for each learning rate; another test set is
    another run.
    """
    base = make_config("base")
    assert make_config("base", steps=9, lr=0.5, seed=3).hash == base.hash
    assert (
        make_config("base", test={**base.test.model_dump(), "count": 3} if base.test else None).hash
        != base.hash
    )


def test_the_hash_follows_the_contents_of_files(make_config: Make, tmp_path: Path) -> None:
    """Editing a data file makes another run: a result never stands for data that it was not made
    from.
    """
    path = tmp_path / "train.jsonl"
    path.write_text('{"query": "a", "response": "1"}\n')
    before = make_config(train={"path": str(path)})
    path.write_text('{"query": "a", "response": "2"}\n')
    assert make_config(train={"path": str(path)}).hash != before.hash
    assert before.train.path == str(path)


def test_the_hash_ignores_where_files_are(
    make_config: Make, model_dir: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    """The same model and data elsewhere is the same run: a results folder can be moved, and
    compared across machines.
    """
    shutil.copytree(model_dir, tmp_path / "model")
    shutil.copy(files["train"], tmp_path / "other.jsonl")
    moved = make_config(
        model=str(tmp_path / "model"), train={"path": str(tmp_path / "other.jsonl")}
    )
    assert moved != make_config()
    assert moved.hash == make_config().hash
    with (tmp_path / "model" / "config.json").open("a") as file:
        file.write("\n")
    assert make_config(model=str(tmp_path / "model")).hash != moved.hash
    with pytest.raises(BenchmarkError, match="have changed since this run was planned"):
        load_model(moved)


def test_what_overrides_what() -> None:
    """The row's fields win over the preset's, the command line over both; without a word on lr the
    variant's own holds.
    """
    preset = Preset.model_validate_json(
        json.dumps(
            {
                "name": "p",
                "description": "",
                "run": {
                    "model": "m",
                    "train": {"path": "t"},
                    "test": {"path": "t"},
                    "steps": 5,
                    "targets": ["a"],
                },
                "variants": {
                    "lora": {"fields": {"r": 3, "alpha": 5.0}, "lr": 0.25, "targets": ["b"]},
                    "lora:r=1": {"fields": {"r": 1}, "lr": 0.5},
                },
            }
        )
    )
    assert (resolve(preset, "lora").fields["r"], resolve(preset, "lora").lr) == (3, 0.25)
    assert resolve(preset, "lora").targets == ("b",)
    assert resolve(preset, "lora:r=1").lr == 0.5
    assert resolve(preset, "lora:r=1").targets == ("a",)
    other = resolve(preset, "lora:r=7", {"alpha": 9.0}, lr=0.125, targets=["c"])
    assert (other.fields["r"], other.fields["alpha"], other.lr, other.targets) == (
        7,
        9.0,
        0.125,
        ("c",),
    )
    assert other.label == "lora:r=7,alpha=9.0"
    bare = preset.model_copy(update={"variants": {}})
    assert resolve(bare, "lora").lr > 0
    with pytest.raises(BenchmarkError, match="Use --lr"):
        resolve(bare, "full")


def test_rows_are_variants_with_fields() -> None:
    """`lora:r=4,rslora=true` reads as JSON values, plain words as strings."""
    assert parse_row("lora") == ("lora", {})
    assert parse_row("lora:r=4,alpha=0.5,rslora=true,x=V") == (
        "lora",
        {"r": 4, "alpha": 0.5, "rslora": True, "x": "V"},
    )
    with pytest.raises(BenchmarkError, match="'r4' in row 'lora:r4' is not an assignment"):
        parse_row("lora:r4")


def test_sources(tmp_path: Path) -> None:
    """A file, `tiny`, and a dataset of the hub with its configuration and split are told apart."""
    path = tmp_path / "rows"
    path.touch()
    assert Source.parse(str(path), "test") == {"path": str(path)}
    assert Source.parse("absent.jsonl", "test") == {"path": "absent.jsonl"}
    assert Source.parse("tiny", "test") == {"path": "tiny", "split": "test"}
    assert Source.parse("openai/gsm8k:main", "test") == {
        "path": "openai/gsm8k",
        "name": "main",
        "split": "test",
    }
    assert Source.parse("a/b::train", "test") == {"path": "a/b", "name": None, "split": "train"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"steps": 0}, "setting steps of the row 'lora' is 0. .*greater than 0"),
        ({"lr": "fast"}, "setting lr of the row 'lora' is 'fast'"),
        ({"prompt": "no place"}, "must contain {question}"),
        ({"warmup": 1.0}, "setting warmup .* is 1.0. .*less than 1"),
        ({"test": None}, "test and validation are both missing"),
        ({"stepz": 3}, "there is no setting stepz.* Did you mean 'steps'"),
        ({"train": {}}, "has no setting train.path"),
        ({"test": {"path": "x", "split": "tset"}}, "setting test.split .* is 'tset'"),
    ],
)
def test_a_wrong_setting_is_named(
    make_config: Make, overrides: dict[str, Any], message: str
) -> None:
    """The error names the setting, what is allowed, and what was given, in one line."""
    with pytest.raises(BenchmarkError, match=message) as caught:
        make_config(**overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("row", ["lora:r=0", "lora:rank=4", "nothing_like_it"])
def test_wrong_rows_are_the_cores_errors(make_config: Make, row: str) -> None:
    """Unknown variants and bad fields are found before anything runs, as errors of the core."""
    with pytest.raises(LoraLiteError):
        make_config(row)


def test_rows_without_an_adapter_take_no_fields(make_config: Make) -> None:
    """`full:r=4` would be ignored in silence otherwise."""
    with pytest.raises(
        BenchmarkError, match=r"the row 'full' was given the fields r\. .* has no fields"
    ):
        make_config("full:r=4")


def test_an_unknown_preset_lists_the_known() -> None:
    """The error shows what there is."""
    with pytest.raises(BenchmarkError, match=r"'small' does not exist. The presets are .*tiny"):
        Preset.load("small")
