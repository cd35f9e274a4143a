"""The shipped presets: every row resolves, and costs at full size are the published ones."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import lora_lite as ll
import pytest
import torch
from lora_lite_benchmark.cli import main
from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.full import FullModel
from lora_lite_benchmark.models import load_model
from lora_lite_benchmark.preset import Preset, preset_names, resolve
from lora_lite_benchmark.results import load_results
from lora_lite_benchmark.variants import adapter_arguments, compared_variants
from transformers import LlamaConfig, LlamaForCausalLM

Make = Callable[..., RunConfig]

PUBLISHED = {
    "lora": (3_538_944, 3_538_944),
    "lora_bias": (3_563_520, 3_538_944),
    "pissa": (3_538_944, 7_077_888),
    "dora": (3_563_520, 3_538_944),
    "eva": (3_538_944, 3_538_944),
    "hra": (2_752_512, 5_529_600),
    "delora": (3_538_968, 7_077_888),
    "lora_xs": (24_576, 3_563_520),
    "oft": (1_333_248, 2_752_512),
    "boft": (626_688, 1_376_256),
    "loha": (3_538_944, 88_080_384),
    "lokr": (227_328, 88_080_384),
    "hira": (3_538_944, 88_080_384),
    "miss": (1_572_864, 7_077_888),
    "c3a": (172_032, 88_080_384),
    "shira": (3_538_944, 88_080_384),
    "fourierft": (24_000, 88_080_384),
    "adalora": (2_654_784, 2_654_208),
    "vera": (49_152, 113_246_208),
    "vb_lora": (507_904, 442_368),
    "randlora": (811_008, 113_246_208),
    "corda": (3_538_944, 7_077_888),
    "lora_ga": (3_538_944, 7_077_888),
    "milora": (3_538_944, 7_077_888),
    "olora": (3_538_944, 7_077_888),
    "ia3": (6_144, 0),
    "ia3_ff": (86_016, 0),
    "road": (24_576, 0),
    "antipasto": (15_360, 28_336_128),
    "antipasto_gain": (6_144, 28_311_552),
    "antipasto_ablate": (6_168, 110_592),
    "antipasto_mix": (104_448, 28_409_856),
}
"""Trainable parameters, and MACs a token.

The parameters are as published where the method was: r (d_in + d_out) and so on, on 24 layers of
3584 -> 1024, and for IA3 on 12 layers of 1024 -> 512.
"""


ON_LLAMA = {
    "lora": 9_175_040,
    "lora:r=64": 18_350_080,
    "dora": 9_289_728,
    "adalora": 18_353_664,
    "delora": 9_175_096,
    "loha": 18_350_080,
    "lokr": 2_294_656,
    "oft": 8_171_520,
    "hira": 9_175_040,
    "miss": 7_340_032,
    "c3a": 5_505_024,
    "shira": 9_175_040,
    "fourierft": 56_000,
    "vera": 129_024,
    "randlora": 9_289_728,
    "vb_lora": 1_212_416,
    "road": 229_376,
    "full": 3_212_749_824,
}
"""Trainable parameters in the results of PEFT's comparison of methods on Llama-3.2-3B."""


@pytest.fixture(scope="module")
def full_size() -> ModuleType:
    """The script that measures the full size; its numbers are those of the model."""
    path = Path(__file__).parents[1] / "perf" / "full_size.py"
    spec = importlib.util.spec_from_file_location("full_size", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", preset_names())
def test_every_row_of_every_preset_resolves(name: str) -> None:
    """Its own rows, the rows that it has settings for, and every installed variant, in each of its
    arms.
    """
    preset = Preset.load(name)
    assert preset.name == name
    own = [row for row in preset.rows if row != "all"]
    for arm in preset.arms:
        for row in {"base", *own, *preset.variants, *compared_variants()}:
            if row == "full" and arm:
                continue
            label = f"{row}@{arm}" if arm else row
            assert resolve(preset, label).label == label


def test_published_costs_come_out(full_size: ModuleType) -> None:
    """On a model of Qwen3.5-0.8B's configuration, without weights, each installed variant's row
    costs what was published.
    """
    costs = {
        name: (plan.parameters, plan.macs_per_token) for name, plan in full_size.plans().items()
    }
    assert costs == {name: PUBLISHED[name] for name in costs}
    assert {"lora", "antipasto"} <= costs.keys()


def test_rows_on_llama_have_the_size_that_peft_published() -> None:
    """On a model of Llama-3.2-3B's configuration, without weights, each row of the preset has as
    many parameters as the same method in PEFT's comparison; its one row IA3 is two rows here.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=128_256,
                hidden_size=3_072,
                intermediate_size=8_192,
                num_hidden_layers=28,
                num_attention_heads=24,
                num_key_value_heads=8,
                tie_word_embeddings=True,
            )
        )
    preset = Preset.load("llama-3.2-3b")

    def parameters(row: str) -> int:
        config = resolve(preset, row)
        return ll.plan(model, config.variant, **adapter_arguments(config)).parameters

    rows = [row for row in ON_LLAMA if row != "full"]
    assert {row: parameters(row) for row in rows} == {row: ON_LLAMA[row] for row in rows}
    assert parameters("ia3") + parameters("ia3_ff") == 286_720
    assert FullModel(model.to_empty(device="meta")).num_parameters == ON_LLAMA["full"]


def test_all_linear_leaves_out_what_is_too_narrow(full_size: ModuleType) -> None:
    """LoRA-XS of rank 32 goes to 150 of the 186 linear layers: the others have 16 outputs."""
    config = resolve(Preset.load("all-linear"), "lora_xs")
    plan = ll.plan(full_size.empty_model(), "lora_xs", exclude=config.exclude, **config.fields)
    assert len(plan.placements) == 150
    assert plan.parameters == 150 * 32**2


def test_an_extension_keeps_what_it_does_not_say() -> None:
    """`bnb` trains what `tiny` trains, with its rates."""
    tiny, bnb = Preset.load("tiny"), Preset.load("bnb")
    assert (bnb.run, bnb.variants) == (tiny.run, tiny.variants)
    assert resolve(bnb, "lora").hash == resolve(tiny, "lora").hash
    assert resolve(bnb, "lora@nf4").quantization == "nf4"


def test_an_unknown_arm_lists_the_known() -> None:
    """The error names the preset, and what it has."""
    with pytest.raises(
        BenchmarkError, match=r"preset 'bnb' has no arm 'nf8'\. Its arms are 'nf4', 'int8'"
    ):
        resolve(Preset.load("bnb"), "lora@nf8")
    with pytest.raises(BenchmarkError, match=r"preset 'tiny' has no arm 'nf4'\. It has no arms"):
        resolve(Preset.load("tiny"), "lora@nf4")


def test_packed_weights_are_not_trained() -> None:
    """Full fine-tuning of a quantised base is refused before it starts."""
    with pytest.raises(BenchmarkError, match="packed weights cannot be trained"):
        resolve(Preset.load("bnb"), "full@int8")


@pytest.mark.parametrize("arm", ["nf4", "int8"])
def test_a_quantised_base_is_one(arm: str) -> None:
    """The arm's layers are bitsandbytes', and the model still computes about what it computed."""
    pytest.importorskip("bitsandbytes")
    plain, quantised = (
        load_model(resolve(Preset.load("bnb"), row)) for row in ("base", f"base@{arm}")
    )
    assert type(quantised.get_submodule("model.layers.2.mlp.down_proj")).__name__ in (
        "Linear4bit",
        "Linear8bitLt",
    )
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        expected, found = (model(input_ids=ids).logits.float() for model in (plain, quantised))
    error = float((found - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.3


def test_arms_are_run_side_by_side(tmp_path: Path) -> None:
    """One command trains a variant on the plain base and on both quantised ones, each reloaded onto
    its own.
    """
    pytest.importorskip("bitsandbytes")
    small = [
        "--steps",
        "2",
        "--batch-size",
        "4",
        "--train-count",
        "8",
        "--test-count",
        "4",
        "--max-new-tokens",
        "4",
    ]
    assert (
        main(["run", "--preset", "bnb", "--variants", "dora", *small, "--out", str(tmp_path)]) == 0
    )
    results = {result.config.label: result for result in load_results(tmp_path)}
    rows = {"base", "base@nf4", "base@int8", "dora", "dora@nf4", "dora@int8"}
    assert results.keys() == rows
    losses = {name: result.test.loss for name, result in results.items() if result.test}
    assert len({round(loss, 6) for loss in losses.values()}) == len(rows)
    assert all(results[name].reloaded_identical for name in ("dora", "dora@nf4", "dora@int8"))
    assert "bitsandbytes" in results["dora@nf4"].versions

    header, *lines = [
        line.strip("| ").split(" | ")
        for line in (tmp_path / "table.md").read_text().splitlines()
        if "|" in line
    ]
    table = {line[0]: dict(zip(header, line, strict=True)) for line in lines if line[0] in rows}
    for row in rows:
        lost = table[row]["loss - unquantised"]
        dense = row.partition("@")[0]
        assert (
            lost == "–"
            if row == dense
            else lost.startswith(f"{losses[row] - losses[dense]:+.4f} [")
        )


def test_a_probe_finds_what_is_wired_wrong(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A variant whose parameter gets no gradient passes as long as nothing looks; the probe says
    which parameter it is.
    """
    from lora_lite_lora import LoRA

    model, data = arguments[:2], arguments[2:6]
    options = ["run", "--preset", "probe", "--variants", "lora:r=2", *model, *data, "--no-base"]
    assert main([*options, "--out", str(tmp_path / "right")]) == 0
    forward = LoRA.delta_output
    monkeypatch.setattr(
        LoRA,
        "delta_output",
        lambda self, site, t, x, y: forward(self, site, {**t, "A": t["A"].detach()}, x, y),
    )
    assert main([*options, "--out", str(tmp_path / "wrong")]) == 1
    assert "down_proj.A: no gradient" in next((tmp_path / "wrong").glob("*/error.txt")).read_text()
    capsys.readouterr()
