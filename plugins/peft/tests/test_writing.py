"""Writing beside plain linear layers: PEFT has our logits, and it comes back bit for bit."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

peft = pytest.importorskip("peft")

Make = Callable[..., nn.Module]

TOKENS = torch.tensor([[5, 9, 3, 7, 1, 2], [8, 8, 4, 30, 6, 11]])
TOLERANCE = 1e-5


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model.eval()(input_ids=TOKENS).logits
    return found


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@contextmanager
def quietly() -> Iterator[None]:
    """PEFT warns of what it does not mind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def attached(model: nn.Module, variant: Any, **options: Any) -> ll.Adapter:
    """An adapter with random tensors, as of training."""
    adapter = ll.attach(model, variant, **{"exclude": (), **options})
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    return adapter


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def goes_to_peft(
    make: Callable[[], nn.Module],
    adapter: ll.Adapter,
    model: nn.Module,
    folder: Path,
    **options: Any,
) -> None:
    """PEFT gives our logits from what was written, and so does loading it here."""
    ours = logits(model)
    assert relative(logits(make()), ours) > 1e-4
    with quietly():
        adapter.save(folder, format="peft", **options)
        theirs = peft.PeftModel.from_pretrained(make(), folder)
    assert relative(logits(theirs), ours) < TOLERANCE
    again = make()
    ll.load(again, folder)
    assert relative(logits(again), ours) < TOLERANCE


def comes_back(make: Callable[[], nn.Module], folder: Path, out: Path, **options: Any) -> None:
    """Loaded and written again, the folder has the same tensors, bit for bit."""
    with quietly():
        ll.load(make(), folder).save(out, format="peft", **options)
    before, after = tensors_of(folder), tensors_of(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    "recipe",
    [
        {"q_proj": ("lora", {"r": 3}), "lm_head": "full", r"model\.norm$": "full"},
        {"q_proj": ("lora", {"r": 3}), "o_proj": "full", "embed_tokens": "full"},
        {"q_proj": ("lora", {"r": 3}), "v_proj": ("full", {"only": "bias"})},
        {"q_proj": ("dora", {"r": 3}), "lm_head": "full"},
        {"q_proj": "ia3", "lm_head": "full"},
    ],
)
def test_layers_that_are_trained_whole(
    tiny_llama: Make, tmp_path: Path, recipe: dict[str, Any], native: bool
) -> None:
    """Promise: `full` is PEFT's modules_to_save, and its biases are PEFT's bias="all"."""
    make = lambda: tiny_llama(attention_bias=True)  # noqa: E731
    model = make()
    adapter = attached(model, recipe)
    if not native and "lora" not in str(recipe):
        with pytest.raises(ll.AdapterError, match="full rank"), quietly():
            adapter.save(tmp_path / "out", format="peft")
        return
    goes_to_peft(make, adapter, model, tmp_path / "out", native=native)
    if "lora" in str(recipe):
        comes_back(make, tmp_path / "out", tmp_path / "again", native=native)


def test_servers_are_spoken_of(tiny_llama: Make, tmp_path: Path) -> None:
    adapter = attached(tiny_llama(), {"q_proj": ("lora", {"r": 2}), "lm_head": "full"})
    with pytest.warns(ll.AdapterWarning, match="1 layers that are trained whole.*most servers"):
        adapter.save(tmp_path / "out", format="peft")


def test_what_has_no_place(tiny_llama: Make, tmp_path: Path) -> None:
    """Promise: by name, with nothing written."""
    scaled = attached(tiny_llama(), {"q_proj": ("lora", {"r": 2}), "lm_head": "full"})
    scaled.scale = 0.5
    tied = tiny_llama(tie_word_embeddings=True)
    ids = {"ids": [3, 7]}
    twice = attached(tied, {"q": ("lora", {"r": 2}), "embed_tokens|lm_head": ("tokens", ids)})
    once = attached(
        tiny_llama(tie_word_embeddings=True),
        {"q": ("lora", {"r": 2}), "embed_tokens": ("tokens", ids)},
    )
    convolution = attached(nn.Sequential(nn.Conv1d(4, 4, 2)), "lora", r=2, targets="0")
    cases = [
        (scaled, "has scale 0.5"),
        (attached(tiny_llama(), "full", targets="lm_head"), "and nothing else"),
        (twice, "share their weight, and not the new rows"),
        (once, "share their weight, and not the new rows"),
        (convolution, "linear layers, embeddings and experts"),
    ]
    for adapter, reason in cases:
        with pytest.raises(ll.AdapterError, match=reason):
            adapter.save(tmp_path / "out", format="peft")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_tokens(tiny_llama: Make, tmp_path: Path, tied: bool) -> None:
    """Promise: `tokens` is trainable_token_indices; PEFT has a tied head's rows once."""
    make = lambda: tiny_llama(tie_word_embeddings=tied)  # noqa: E731
    recipe = {"q_proj": ("lora", {"r": 2}), "embed_tokens": ("tokens", {"ids": [30, 3, 8]})}
    if tied:
        recipe["lm_head"] = recipe["embed_tokens"]
    model = make()
    adapter = attached(model, recipe)
    if tied:
        state = adapter.state_dict()
        adapter.load_state_dict({**state, "lm_head.rows": state["model.embed_tokens.rows"]})
    goes_to_peft(make, adapter, model, tmp_path / "out")
    indices = config_of(tmp_path / "out")["trainable_token_indices"]
    assert indices == {"model.embed_tokens": [3, 8, 30]}
    comes_back(make, tmp_path / "out", tmp_path / "again")


@pytest.mark.parametrize("native", [False, True])
def test_a_bias_of_the_adapters_own(tiny_llama: Make, tmp_path: Path, native: bool) -> None:
    """Promise: `lora_bias` is PEFT's lora_bias, bit for bit, scaled or not."""
    model = tiny_llama()
    adapter = attached(model, "lora_bias", r=4, alpha=6.0, targets=r"[qv]_proj$")
    goes_to_peft(tiny_llama, adapter, model, tmp_path / "out", native=native)
    comes_back(tiny_llama, tmp_path / "out", tmp_path / "again", native=native)
    overrides = {"q_proj": {"r": 2, "alpha": 3.0}}
    model = tiny_llama()
    adapter = attached(model, "lora_bias", r=4, targets=r"[qv]_proj$", overrides=overrides)
    adapter.scale = 0.5
    goes_to_peft(tiny_llama, adapter, model, tmp_path / "other", native=native)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("name", ["lora", "pissa"])
def test_embeddings(tiny_llama: Make, tmp_path: Path, name: str, native: bool) -> None:
    """Promise: an embedding is written as PEFT's LoRA of one, whatever the method."""
    if native and name == "pissa":
        pytest.skip("it is written as plain LoRA")
    model = tiny_llama()
    adapter = attached(model, name, r=3, targets="embed_tokens|q_proj")
    goes_to_peft(tiny_llama, adapter, model, tmp_path / "out", native=native)
    comes_back(tiny_llama, tmp_path / "out", tmp_path / "again")


DENSE: list[tuple[str, dict[str, Any]]] = [
    ("loha", {"r": 3, "alpha": 5.0, "overrides": {"q_proj": {"r": 2, "alpha": 4.0}}}),
    ("lokr", {"r": 3, "factor": 4, "overrides": {"q_proj": {"alpha": 4.0}}}),
    ("lokr", {"r": 1, "factor": 2}),
    ("oft", {"block_size": 8}),
    ("miss", {"r": 3}),
    ("hira", {"r": 3}),
    ("c3a", {"block_size": 8, "overrides": {"q_proj": {"block_size": 4}}}),
    ("shira", {"r": 2}),
]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize(("name", "options"), DENSE, ids=[f"{n} {o}" for n, o in DENSE])
def test_other_types_of_pefts_own(
    tiny_llama: Make, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    """Promise: methods that PEFT has are written as its own types, and come back bit for bit."""
    model = tiny_llama()
    adapter = attached(model, name, targets=r"(q|down)_proj$", **options)
    goes_to_peft(tiny_llama, adapter, model, tmp_path / "out", native=True)
    assert config_of(tmp_path / "out")["peft_type"] == name.upper()
    comes_back(tiny_llama, tmp_path / "out", tmp_path / "again", native=True)
    adapter.scale = 0.5
    with pytest.raises(ll.AdapterError, match=r"has scale 0\.5"):
        adapter.save(tmp_path / "scaled", format="peft", native=True)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("oft", {"block_size": 8, "overrides": {"q_proj": {"block_size": 4}}}, "several sizes"),
        ("lokr", {"factor": 4, "overrides": {"q_proj": {"factor": 2}}}, "divide some of these"),
        ("miss", {"r": 3, "overrides": {"q_proj": {"r": 2}}}, "different values of r"),
        ("hira", {"r": 3, "overrides": {"q_proj": {"r": 2}}}, "different values of r"),
    ],
)
def test_what_pefts_own_types_cannot_have(
    tiny_llama: Make, tmp_path: Path, name: str, options: dict[str, Any], reason: str
) -> None:
    adapter = attached(tiny_llama(), name, targets=r"(q|down)_proj$", **options)
    with pytest.raises(ll.AdapterError, match=reason):
        adapter.save(tmp_path / "out", format="peft", native=True)
    assert not (tmp_path / "out").exists()


# --- experts


@pytest.mark.parametrize("width", [12, 16])
@pytest.mark.parametrize("family", ["qwen3", "gpt-oss"])
@pytest.mark.parametrize("name", ["lora", "antipasto"])
@pytest.mark.parametrize("targets", [r"experts\.\w+_proj$|q_proj", r"experts\.down_proj$"])
def test_experts(
    mixture: Make, tmp_path: Path, family: str, name: str, targets: str, width: int
) -> None:
    """Promise: experts of any method of low rank are PEFT's target_parameters; LoRA's bits stay."""
    make = lambda: mixture(family, width)  # noqa: E731
    model = make()
    adapter = attached(model, name, r=4, targets=targets)
    goes_to_peft(make, adapter, model, tmp_path / "out")
    comes_back(make, tmp_path / "out", tmp_path / "again")
    state = adapter.state_dict()
    if name == "lora":
        back = ll.load(make(), tmp_path / "out").state_dict()
        assert all(torch.equal(back[key], tensor) for key, tensor in state.items())


def test_experts_that_are_shifted_are_refused(mixture: Make, tmp_path: Path) -> None:
    """PEFT has no lora_bias beside target_parameters."""
    adapter = attached(mixture("qwen3"), "lora_bias", r=2, targets=r"experts\.|q_proj")
    for native in (False, True):
        with pytest.raises(ll.AdapterError, match="shifts outputs by a constant, and is on"):
            adapter.save(tmp_path / "out", format="peft", native=native)
    assert not (tmp_path / "out").exists()


def test_experts_of_other_types_are_refused(mixture: Make, tmp_path: Path) -> None:
    adapter = attached(mixture("qwen3"), "hra", r=2, targets=r"experts\.")
    with pytest.raises(ll.AdapterError, match="by LoRA alone"):
        adapter.save(tmp_path / "out", format="peft", native=True)


@pytest.mark.parametrize("name", ["lora", "hra"])
def test_a_base_in_bfloat16(tiny_llama: Make, tmp_path: Path, name: str) -> None:
    """Promise: on a base in bfloat16 the folder is the same change, as near as bfloat16 has it."""
    make = lambda: tiny_llama().bfloat16()  # noqa: E731
    model = make()
    adapter = attached(model, name, r=2)
    adapter.save(tmp_path / "out", format="peft")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "out")
    assert relative(logits(make()), logits(model)) > 0.15
    assert relative(logits(theirs), logits(model)) < 0.1
