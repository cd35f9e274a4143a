"""Folders of PEFT: written ones have our logits in PEFT, and PEFT's own have their logits here."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

peft = pytest.importorskip("peft")

Make = Callable[..., nn.Module]
Guard = Callable[[nn.Module], AbstractContextManager[None]]
Case = tuple[str, dict[str, Any]]

TOKENS = torch.tensor([[5, 9, 3, 7, 1, 2], [8, 8, 4, 30, 6, 11]])
# Of logits, relative to the largest, between two orders of the same float32 products.
TOLERANCE = 1e-5
TARGETS = r"(q|k|v|down)_proj$"

LOW_RANK: list[Case] = [
    ("lora", {"r": 3, "alpha": 7.0}),
    ("lora", {"r": 4, "alpha": 6.0, "rslora": True}),
    ("eva", {"r": 3}),
    ("pissa", {"r": 3}),
    ("delora", {"r": 3, "start": "zero_b"}),
    ("delora", {"r": 2, "start": "subtract", "norm": "scalar"}),
    ("lora_xs", {"r": 3}),
    ("hra", {"r": 4}),
    ("antipasto", {"r": 4, "rotate_basis": "both"}),
    ("antipasto_gain", {"r": 4}),
    ("antipasto_mix", {"r": 4, "k": 2}),
    ("antipasto_ablate", {"r": 4, "k": 2}),
]
FULL_RANK: list[Case] = [
    ("dora", {"r": 3, "alpha": 5.0}),
    ("ia3", {}),
    ("ia3_ff", {}),
    ("road", {"group_size": 4, "sharing": "road_2"}),
]


def ids(case: Case) -> str:
    name, fields = case
    return " ".join([name, *(f"{field}={value}" for field, value in fields.items())])


@pytest.fixture(params=["plain", "biased", "tied", "gpt2"])
def make(request: pytest.FixtureRequest, tiny_llama: Make, tiny_gpt2: Make) -> Make:
    """Makes a small language model, the same one every time."""

    def make_one() -> nn.Module:
        if request.param == "gpt2":
            return tiny_gpt2().eval()
        is_biased = request.param == "biased"
        options = {
            "attention_bias": is_biased,
            "mlp_bias": is_biased,
            "tie_word_embeddings": request.param == "tied",
            "initializer_range": 0.3,
        }
        model = tiny_llama(**options).eval()
        rng = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    parameter.normal_(generator=rng)
        return model

    return make_one


def adapted(model: nn.Module, case: Case, **options: Any) -> ll.Adapter:
    """An adapter with random tensors, as of training."""
    name, fields = case
    arguments: dict[str, Any] = {"targets": rf"{TARGETS}|c_attn$|mlp\.c_proj$", **options}
    if name == "eva":
        arguments["calibration"] = [{"input_ids": TOKENS}]
    adapter = ll.attach(model, name, **arguments, **fields)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
            if name.startswith("antipasto_ablate"):
                parameter.abs_()
    adapter.project()
    return adapter


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits
    return found


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def in_peft(make: Make, folder: Path) -> nn.Module:
    model: nn.Module = peft.PeftModel.from_pretrained(make(), folder).eval()
    return model


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


# --- writing


@pytest.mark.parametrize("case", LOW_RANK, ids=ids)
def test_every_method_of_low_rank_is_plain_lora_in_peft(
    make: Make, tmp_path: Path, case: Case
) -> None:
    """PEFT gives our logits, from one rank, lora_alpha, and no patterns or rslora."""
    model = make()
    base = logits(model)
    adapter = adapted(model, case)
    adapter.scale = 0.75
    adapter.save(tmp_path / "out", format="peft")
    config = config_of(tmp_path / "out")
    assert config["peft_type"] == "LORA"
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["use_rslora"] is False
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {len(t) for name, t in tensors.items() if "lora_A" in name} == {config["r"]}
    assert relative(base, logits(model)) > 1e-3
    assert relative(logits(in_peft(make, tmp_path / "out")), logits(model)) < TOLERANCE


def test_other_ranks_and_scales_are_folded_in(make: Make, tmp_path: Path) -> None:
    """Layers of several ranks and scalings are one rank and lora_alpha = r, in PEFT ours."""
    model = make()
    name = target_names(make)[0]
    overrides = {f"1.*{name}": {"r": 2}, f"0.*{name}": {"alpha": 3.0, "rslora": True}}
    adapter = adapted(model, ("lora", {"r": 4, "alpha": 6.0}), overrides=overrides)
    adapter.save(tmp_path / "out", format="peft")
    config = config_of(tmp_path / "out")
    assert config["r"] == config["lora_alpha"] == 4
    assert not any(config[key] for key in ("rank_pattern", "alpha_pattern", "use_rslora"))
    assert relative(logits(in_peft(make, tmp_path / "out")), logits(model)) < TOLERANCE


@pytest.mark.parametrize(
    "case",
    [*FULL_RANK, ("hra", {"r": 4}), ("delora", {"r": 3, "start": "zero_b"}), ("pissa", {"r": 2})],
    ids=ids,
)
def test_native_types(make: Make, tmp_path: Path, case: Case) -> None:
    """PEFT's own type gives our logits; a method without one is written as plain LoRA."""
    model = make()
    if type(model).__name__.startswith("GPT2") and case[0] in ("hra", "road", "delora"):
        pytest.skip("PEFT has this type for nn.Linear only")
    adapter = adapted(model, case, targets=r"(q|v|down)_proj$|c_attn$|mlp\.c_proj$")
    adapter.save(tmp_path / "out", format="peft", native=True)
    kinds = {"dora": "LORA", "ia3": "IA3", "ia3_ff": "IA3", "pissa": "LORA"}
    assert config_of(tmp_path / "out")["peft_type"] == kinds.get(case[0], case[0].upper())
    assert relative(logits(in_peft(make, tmp_path / "out")), logits(model)) < TOLERANCE


@pytest.mark.parametrize("case", FULL_RANK, ids=ids)
def test_full_rank_is_refused_with_the_ways_out(
    tiny_llama: Make, tmp_path: Path, case: Case
) -> None:
    """Nothing is written, and the error says native=True, merged, and rank=."""
    adapter = adapted(tiny_llama(), case, targets=r"(v|down)_proj$")
    with pytest.raises(ll.AdapterError, match="of full rank") as caught:
        adapter.save(tmp_path / "out", format="peft")
    for way in ("native=True", 'format="merged"', "rank="):
        assert way in str(caught.value)
    assert not (tmp_path / "out").exists()
    with pytest.warns(ll.AdapterWarning, match="was truncated"):
        adapter.save(tmp_path / "out", format="peft", rank=4)
    assert config_of(tmp_path / "out")["r"] == 4


def test_native_lora_keeps_patterns_and_rslora(make: Make, tmp_path: Path) -> None:
    """native=True writes the tensors as they are, and PEFT finds each layer's rank and alpha."""
    model = make()
    overrides: dict[str, dict[str, Any]]
    if type(model).__name__.startswith("GPT2"):
        overrides = {"c_attn": {"r": 2}}
    else:
        overrides = {"q_proj": {"r": 2}, r"1.*down_proj": {"alpha": 3.0}}
    case: Case = ("lora", {"r": 4, "rslora": True})
    adapter = adapted(model, case, overrides=overrides)
    adapter.scale = 0.5
    adapter.save(tmp_path / "out", format="peft", native=True)
    assert config_of(tmp_path / "out")["rank_pattern"]
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key, tensor in adapter.state_dict().items():
        path, _, name = key.rpartition(".")
        assert torch.equal(saved[f"base_model.model.{path}.lora_{name}.weight"], tensor)
    assert relative(logits(in_peft(make, tmp_path / "out")), logits(model)) < TOLERANCE
    adapter.detach()
    again = ll.load(model, tmp_path / "out")
    assert sorted({v.r for v in again.sites.values()}) == [2, 4]  # type: ignore[attr-defined]


def test_a_path_that_ends_another_is_not_adapted_there(tmp_path: Path) -> None:
    """PEFT takes target_modules for the ends of paths; ours are whole paths."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up = nn.Linear(6, 6)
            self.inner = nn.ModuleDict({"up": nn.Linear(6, 6)})

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner["up"](self.up(x))
            return y

    model = Two()
    adapter = adapted(model, ("lora", {"r": 2}), targets=r"^up$")
    adapter.save(tmp_path / "out", format="peft")
    theirs = in_peft(Two, tmp_path / "out")
    x = torch.randn(3, 6)
    torch.testing.assert_close(theirs(x), model(x))


def test_unknown_options_and_names_are_refused(tiny_llama: Make, tmp_path: Path) -> None:
    adapter = ll.attach(tiny_llama(), "lora", r=2)
    with pytest.raises(ll.AdapterFileError, match=r"does not take 'nativ'.*native, rank"):
        adapter.save(tmp_path / "out", format="peft", nativ=True)
    with pytest.raises(ll.AdapterError, match="exclude each other"):
        adapter.save(tmp_path / "out", format="peft", native=True, rank=2)
    with pytest.raises(ll.AdapterFileError, match="derived=False"):
        adapter.save(tmp_path / "out", format="peft", derived=False)
    assert not (tmp_path / "out").exists()


def test_mixed_types_are_refused(tiny_llama: Make, tmp_path: Path) -> None:
    recipe = {r"q_proj$": ("dora", {"r": 2}), r"v_proj$": ("lora", {"r": 2})}
    adapter = ll.attach(tiny_llama(), recipe)
    with pytest.raises(ll.AdapterError, match="has one type, and the adapter has dora, lora"):
        adapter.save(tmp_path / "out", format="peft", native=True)


def test_a_folder_that_cannot_be_written(tiny_llama: Make, tmp_path: Path) -> None:
    """The error names the path, and a file in the way is untouched."""
    (tmp_path / "file").write_text("mine")
    adapter = ll.attach(tiny_llama(), "lora", r=2)
    with pytest.raises(ll.AdapterFileError, match="cannot be written"):
        adapter.save(tmp_path / "file", format="peft")
    assert (tmp_path / "file").read_text() == "mine"


# --- reading


def saved_by_peft(make: Make, folder: Path, config: Any, noise: float = 0.2) -> Tensor:
    """Let PEFT write an adapter with random tensors, and give its logits."""
    model = peft.get_peft_model(make(), config).eval()
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(noise * torch.randn(parameter.shape, generator=rng))
            assert "lora_B.bias" not in name
    model.save_pretrained(folder)
    return logits(model)


def target_names(make: Make) -> list[str]:
    is_gpt2 = type(make()).__name__.startswith("GPT2")
    return ["c_attn", "mlp.c_proj"] if is_gpt2 else ["q_proj", "v_proj", "down_proj"]


def configs(make: Make) -> dict[str, Any]:
    names = target_names(make)
    is_gpt2 = "c_attn" in names
    lora = {"target_modules": names, "fan_in_fan_out": is_gpt2, "r": 4, "lora_alpha": 6}
    found = {
        "lora": peft.LoraConfig(**lora),
        "rslora": peft.LoraConfig(**lora, use_rslora=True),
        "patterns": peft.LoraConfig(
            **lora, rank_pattern={names[0]: 2}, alpha_pattern={rf"1\..*{names[-1]}": 3}
        ),
        "gaussian": peft.LoraConfig(**lora, init_lora_weights="gaussian", bias="none"),
        "dora": peft.LoraConfig(**lora, use_dora=True),
        "ia3": peft.IA3Config(
            target_modules=names, feedforward_modules=names[-1:], fan_in_fan_out=is_gpt2
        ),
    }
    if not is_gpt2:
        found |= {
            "hra": peft.HRAConfig(target_modules=names, r=4),
            "road_1": peft.RoadConfig(target_modules=names, group_size=4),
            "road_4": peft.RoadConfig(target_modules=names, group_size=8, variant="road_4"),
            "delora": peft.DeloraConfig(
                target_modules=names, r=3, rank_pattern={names[0]: 2}, lambda_pattern={names[1]: 7}
            ),
        }
    return found


KINDS = ["lora", "rslora", "patterns", "gaussian", "dora", "ia3", "hra", "road_1", "road_4"]


@pytest.mark.parametrize("kind", [*KINDS, "delora"])
def test_what_peft_wrote_has_its_logits_here(make: Make, tmp_path: Path, kind: str) -> None:
    """Loaded from PEFT's folder, an adapter gives PEFT's logits; detached, the base's, bitwise."""
    config = configs(make).get(kind)
    if config is None:
        pytest.skip("PEFT has this type for nn.Linear only")
    theirs = saved_by_peft(make, tmp_path / "peft", config)
    model = make()
    base = logits(model)
    adapter = ll.load(model, tmp_path / "peft", name="theirs")
    assert adapter.name == "theirs"
    assert relative(base, theirs) > 1e-3
    assert relative(logits(model), theirs) < TOLERANCE
    adapter.detach()
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("kind", ["lora", "rslora", "patterns", "dora"])
def test_there_and_back_keeps_the_bits(make: Make, tmp_path: Path, kind: str) -> None:
    """PEFT → here → PEFT: A and B are the same bits, and the logits PEFT's."""
    theirs = saved_by_peft(make, tmp_path / "peft", configs(make)[kind])
    ll.load(make(), tmp_path / "peft").save(tmp_path / "out", format="peft", native=True)
    if kind == "lora":  # needs no native=True
        ll.load(make(), tmp_path / "peft").save(tmp_path / "out", format="peft")
    before = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if "magnitude" in name:
            torch.testing.assert_close(after[name], tensor)
        else:
            assert torch.equal(after[name], tensor)
            assert after[name].dtype == tensor.dtype
    assert relative(logits(in_peft(make, tmp_path / "out")), theirs) < TOLERANCE


def test_a_bfloat16_checkpoint_keeps_its_bits(tiny_llama: Make, tmp_path: Path) -> None:
    saved_by_peft(tiny_llama, tmp_path / "peft", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    file = tmp_path / "peft" / "adapter_model.safetensors"
    half = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(half, file)
    ll.load(tiny_llama(), tmp_path / "peft").save(tmp_path / "out", format="peft")
    for name, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, half[name])


def test_the_file_in_the_folder_will_do(tiny_llama: Make, tmp_path: Path) -> None:
    """The path of adapter_model.safetensors is that of its folder; names can be changed."""
    saved_by_peft(tiny_llama, tmp_path / "peft", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    outer = nn.ModuleDict({"inner": tiny_llama()})
    adapter = ll.load(
        outer, tmp_path / "peft" / "adapter_model.safetensors", rename={r"^": "inner."}
    )
    assert all(path.startswith("inner.model.layers.") for path in adapter.sites)
    with pytest.raises(ll.AdapterFileError, match="under other paths"):
        ll.load(nn.ModuleDict({"inner": tiny_llama()}), tmp_path / "peft")


def test_an_odd_number_of_reflections(tiny_llama: Make, tmp_path: Path) -> None:
    """PEFT has HRA of odd rank; a row of zeros more changes nothing."""
    config = peft.HRAConfig(target_modules=["q_proj"], r=3, init_weights=False)
    theirs = saved_by_peft(tiny_llama, tmp_path / "peft", config)
    model = tiny_llama().eval()
    ll.load(model, tmp_path / "peft")
    assert relative(logits(model), theirs) < TOLERANCE


# --- what is refused, with nothing attached


def refused(model: nn.Module, folder: Path, guard: Guard, reason: str) -> None:
    """Loading says why not, and leaves the model as it was."""
    with guard(model), pytest.raises(ll.AdapterFileError, match=reason):
        ll.load(model, folder)


@pytest.fixture
def folder(tiny_llama: Make, tmp_path: Path) -> Path:
    """A folder that PEFT wrote."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    saved_by_peft(tiny_llama, tmp_path / "peft", config)
    return tmp_path / "peft"


def change_config(folder: Path, **changes: Any) -> None:
    config = {**config_of(folder), **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*rewrite the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"init_lora_weights": "eva"}, "init_lora_weights='eva'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True.*are Linear"),
        ({"use_dora": True}, "without lora_magnitude_vector"),
        ({"r": 3}, "rank 2, and the config says 3"),
        ({"r": "two"}, "the config's r='two'"),
        ({"lora_alpha": -1}, "alpha=-1"),
        ({"target_parameters": ["experts"]}, "target_parameters="),
        ({"layer_replication": [[0, 1]]}, "layer_replication="),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens="),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"something_new": 3}, "something_new=3"),
        ({"peft_type": "POLY"}, "type 'POLY'.*LORA, IA3"),
        ({"peft_type": None}, "type None"),
    ],
)
def test_settings_that_would_be_silently_wrong(
    tiny_llama: Make, folder: Path, untouched: Guard, changes: dict[str, Any], reason: str
) -> None:
    change_config(folder, **changes)
    refused(tiny_llama(), folder, untouched, f"(?s){reason}")


def test_biases_as_in_the_base_say_nothing(
    tiny_llama: Make, tmp_path: Path, untouched: Guard
) -> None:
    """Biases like the base's are passed over; trained ones beside DoRA are refused by name."""

    def make() -> nn.Module:
        return tiny_llama(attention_bias=True)

    for bias in ("all", "lora_only"):
        options = {"r": 2, "target_modules": ["q_proj"], "bias": bias}
        saved_by_peft(make, tmp_path / bias, peft.LoraConfig(**options), noise=0.0)
        assert ll.load(make(), tmp_path / bias).variant.name == "lora"
        saved_by_peft(make, tmp_path / f"{bias} dora", peft.LoraConfig(**options, use_dora=True))
        refused(make(), tmp_path / f"{bias} dora", untouched, "q_proj has DoRA and a bias")


@pytest.mark.parametrize("saved", ["lm_head", "norm", "input_layernorm", "o_proj", "embed_tokens"])
def test_modules_to_save_become_full(tiny_llama: Make, tmp_path: Path, saved: str) -> None:
    """What PEFT has trained whole beside the adapter is trained whole here, on any other start."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[saved])
    theirs = saved_by_peft(tiny_llama, tmp_path / "peft", config)
    model = tiny_llama()
    if saved == "lm_head":
        torch.nn.init.normal_(model.lm_head.weight)  # as a new head would be
    base = logits(model)
    adapter = ll.load(model, tmp_path / "peft")
    assert {variant.name for variant in adapter.sites.values()} == {"lora", "full"}
    assert relative(logits(model), theirs) < TOLERANCE
    adapter.detach()
    assert torch.equal(logits(model), base)
    saved_by_peft(tiny_llama, tmp_path / "same", config, noise=0.0)
    assert {v.name for v in ll.load(tiny_llama(), tmp_path / "same").sites.values()} == {"lora"}


def test_gram_schmidt_is_refused(tiny_llama: Make, tmp_path: Path, untouched: Guard) -> None:
    config = peft.HRAConfig(target_modules=["q_proj"], r=4, apply_GS=True)
    saved_by_peft(tiny_llama, tmp_path / "peft", config)
    refused(tiny_llama(), tmp_path / "peft", untouched, "(?s)apply_GS=True")


@pytest.mark.parametrize("rslora", [False, True])
def test_an_embedding_is_read(tiny_llama: Make, tmp_path: Path, rslora: bool) -> None:
    names = ["embed_tokens", "q_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=names, use_rslora=rslora)
    with pytest.warns(UserWarning, match="embedding"):
        theirs = saved_by_peft(tiny_llama, tmp_path / "peft", config)
    model = tiny_llama()
    adapter = ll.load(model, tmp_path / "peft")
    assert "model.embed_tokens" in adapter.sites
    assert relative(logits(model), theirs) < TOLERANCE


def test_bad_folders(tiny_llama: Make, folder: Path, tmp_path: Path, untouched: Guard) -> None:
    """Missing files, damage, strange tensors and another base: an error, and nothing attached."""
    model = tiny_llama()

    def broken(change: Callable[[Path], object]) -> Path:
        copy = tmp_path / "broken"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        change(copy)
        return copy

    def rewrite(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
        def rewritten(copy: Path) -> None:
            tensors = load_file(copy / "adapter_model.safetensors")
            change(tensors)
            save_file(tensors, copy / "adapter_model.safetensors")

        return rewritten

    first = next(iter(load_file(folder / "adapter_model.safetensors")))
    file = "adapter_model.safetensors"
    cases: list[tuple[Callable[[Path], object], str]] = [
        (lambda copy: (copy / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda copy: (copy / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda copy: (copy / "adapter_config.json").write_text("[]"), "a JSON object"),
        (lambda copy: (copy / file).unlink(), f"has no {file}"),
        (lambda copy: (copy / file).rename(copy / "adapter_model.bin"), "a pickle"),
        (lambda copy: (copy / file).write_bytes((copy / file).read_bytes()[:-9]), "cannot be read"),
        (rewrite(lambda t: t.pop(first)), "without lora_[AB]"),
        (rewrite(lambda t: t.clear()), "adapts no layer"),
        (rewrite(lambda t: t.update({f"{first}x": torch.ones(1)})), "(?s)no place for.*not known"),
        (rewrite(lambda t: t.update({"other.weight": torch.ones(1)})), "not those of a PeftModel"),
        (rewrite(lambda t: t[first].fill_(float("nan"))), "not finite"),
    ]
    for change, reason in cases:
        refused(model, broken(change), untouched, reason)
    refused(tiny_llama(hidden_size=32), folder, untouched, r"(?s)tensors do not fit.*shape \[2, 16")
    refused(tiny_llama(num_hidden_layers=1), folder, untouched, r"does not have 2 of them")


def test_the_plugin_is_named_where_it_is_missing(
    tiny_llama: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without this package, `load` and `save` name the pip command."""
    from lora_lite import format_plugins

    monkeypatch.setattr(format_plugins, "_entry_points", dict)
    hook = format_plugins.manager.hook
    monkeypatch.setattr(hook, "lora_lite_format", lambda **_: None)
    with pytest.raises(ll.AdapterFileError, match="pip install lora-lite-peft"):
        ll.load(tiny_llama(), folder)
    with pytest.raises(ll.PluginError, match="pip install lora-lite-peft") as caught:
        ll.attach(tiny_llama(), "lora", r=2).save(folder, format="peft")
    assert re.search("'peft' is not installed", str(caught.value))
