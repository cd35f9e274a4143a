"""What PEFT writes beside plain LoRA: read here it has PEFT's logits, or is refused by name."""

import json
import warnings
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

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")

TOKENS = torch.tensor([[5, 9, 3, 7, 1, 2], [8, 8, 4, 30, 6, 11]])
TOLERANCE = 1e-5


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model.eval()(input_ids=TOKENS).logits
    return found


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def saved_by_peft(make: Callable[[], nn.Module], folder: Path, config: Any) -> Tensor:
    """Let PEFT write an adapter with random tensors, and give its logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(make(), config).eval()
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=rng))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about its own files
        model.save_pretrained(folder)
    return logits(model)


def has_pefts_logits(
    make: Callable[[], nn.Module], folder: Path, config: Any, guard: Guard
) -> ll.Adapter:
    """Loaded here, the adapter gives PEFT's logits; detached, it leaves the base's, bitwise."""
    theirs = saved_by_peft(make, folder, config)
    model = make()
    base = logits(model)
    with guard(model):
        adapter = ll.load(model, folder)
        assert relative(base, theirs) > 1e-4
        assert relative(logits(model), theirs) < TOLERANCE
        adapter.detach()
    assert torch.equal(logits(model), base)
    return ll.load(model, folder)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def change_config(folder: Path, **changes: Any) -> None:
    config = {**config_of(folder), **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))


NAMES = {"target_modules": ["q_proj", "down_proj"]}
TYPES: dict[str, Any] = {
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, rank_pattern={"q_proj": 2}, **NAMES),
    "lokr": lambda: peft.LoKrConfig(r=3, alpha=5, alpha_pattern={"q_proj": 4}, **NAMES),
    "lokr of low rank": lambda: peft.LoKrConfig(r=1, decompose_factor=2, **NAMES),
    "lokr of two": lambda: peft.LoKrConfig(r=1, decompose_both=True, decompose_factor=4, **NAMES),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, **NAMES),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, use_cayley_neumann=False, **NAMES),
    "miss": lambda: peft.MissConfig(r=3, **NAMES),
    "hira": lambda: peft.HiraConfig(r=3, **NAMES),
    "c3a": lambda: peft.C3AConfig(block_size=4, **NAMES),
    "shira": lambda: peft.ShiraConfig(r=2, random_seed=5, **NAMES),
    "vera": lambda: peft.VeraConfig(r=3, **NAMES),
    "vb_lora": lambda: peft.VBLoRAConfig(r=3, num_vectors=6, vector_length=8, **NAMES),
    "randlora": lambda: peft.RandLoraConfig(r=3, randlora_alpha=6, **NAMES),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=3, target_r=2, total_step=10, tinit=1, tfinal=1, **NAMES
    ),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=30, random_loc_seed=9, **NAMES),
}


@pytest.mark.parametrize("kind", TYPES)
def test_other_types(tiny_llama: Make, tmp_path: Path, untouched: Guard, kind: str) -> None:
    """Promise: PEFT's types of methods that are here have PEFT's logits, patterns included."""
    adapter = has_pefts_logits(tiny_llama, tmp_path / "peft", TYPES[kind](), untouched)
    assert {variant.name for variant in adapter.sites.values()} == {kind.partition(" ")[0]}


@pytest.mark.parametrize("kind", TYPES)
def test_other_types_beside_a_trained_head(
    tiny_llama: Make, tmp_path: Path, untouched: Guard, kind: str
) -> None:
    """Promise: modules_to_save of any type become `full`."""
    config = TYPES[kind]()
    config.modules_to_save = ["lm_head"]
    adapter = has_pefts_logits(tiny_llama, tmp_path / "peft", config, untouched)
    assert adapter.sites["lm_head"].name == "full"


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("oft", {"use_cayley_neumann": True}, "use_cayley_neumann=True.*exact transform"),
        ("boft", {"boft_dropout": 0.1}, "boft_dropout=0.1"),
        ("oft", {"coft": True}, "coft=True"),
        ("oft", {"block_share": True}, "block_share=True"),
        ("oft", {"module_dropout": 0.1}, "module_dropout=0.1"),
        ("miss", {"init_weights": "bat"}, "init_weights='bat'"),
        ("hira", {"hira_dropout": 0.1}, "hira_dropout=0.1"),
        ("loha", {"rank_dropout": 0.1}, "rank_dropout=0.1"),
        ("loha", {"use_effective_conv2d": True}, "use_effective_conv2d=True"),
        ("loha", {"peft_type": "LOKR"}, "hada_w1_a"),
        ("shira", {"r": 3}, "v.*shape"),
        ("fourierft", {"scaling": -1}, "scaling=-1"),
        ("lokr of low rank", {"r": 2}, "lokr here divides this layer into"),
        ("c3a", {"new_setting": 2}, "new_setting=2"),
        ("vera", {"r": 4}, "A.*shape"),
        ("vb_lora", {"save_only_topk_weights": True}, "save_only_topk_weights=True"),
        ("vb_lora", {"topk": 1}, "topk|k"),
        ("adalora", {"rank_pattern": {"q_proj": 2}}, "rank_pattern="),
        ("adalora", {"lora_dropout": 0.1}, "lora_dropout=0.1"),
    ],
)
def test_settings_of_other_types_that_would_be_silently_wrong(
    tiny_llama: Make,
    tmp_path: Path,
    untouched: Guard,
    kind: str,
    changes: dict[str, Any],
    reason: str,
) -> None:
    saved_by_peft(tiny_llama, tmp_path / "peft", TYPES[kind]())
    change_config(tmp_path / "peft", **changes)
    model = tiny_llama()
    with untouched(model), pytest.raises(ll.AdapterFileError, match=f"(?s){reason}"):
        ll.load(model, tmp_path / "peft")


def test_indices_that_a_layer_does_not_have(
    tiny_llama: Make, tmp_path: Path, untouched: Guard
) -> None:
    saved_by_peft(tiny_llama, tmp_path / "peft", TYPES["shira"]())
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(t for name, t in tensors.items() if name.endswith("indices"))[1, 0] = 400
    save_file(tensors, file)
    model = tiny_llama()
    with untouched(model), pytest.raises(ll.AdapterFileError, match="shira_indices outside of"):
        ll.load(model, tmp_path / "peft")


def test_layer_norms(tiny_llama: Make, tmp_path: Path, untouched: Guard) -> None:
    config = peft.LNTuningConfig(target_modules=["input_layernorm", "norm"])
    adapter = has_pefts_logits(tiny_llama, tmp_path / "peft", config, untouched)
    assert {variant.name for variant in adapter.sites.values()} == {"full"}
    assert "model.norm" in adapter.sites


# --- beside a LoRA


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_biases(
    tiny_llama: Make, tmp_path: Path, untouched: Guard, bias: str, lora_bias: bool
) -> None:
    """Promise: biases that were trained are read, at adapted layers and at others."""

    def make() -> nn.Module:
        model = tiny_llama(attention_bias=True, mlp_bias=True)
        rng = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    parameter.normal_(generator=rng)
        return model

    if lora_bias:
        bias = "none"
    config = peft.LoraConfig(r=2, lora_alpha=3, bias=bias, lora_bias=lora_bias, **NAMES)
    adapter = has_pefts_logits(make, tmp_path / "peft", config, untouched)
    names = {path.rpartition(".")[2]: variant.name for path, variant in adapter.sites.items()}
    assert names["q_proj"] == names["down_proj"] == "lora_bias"
    assert names.get("v_proj") == ("full" if bias == "all" else None)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ids", [[7, 3, 30], {"embed_tokens": [7, 3, 30]}])
def test_rows_of_tokens(
    tiny_llama: Make, tmp_path: Path, untouched: Guard, tied: bool, ids: Any
) -> None:
    """Promise: rows go to their tokens whatever their order, and to a tied head as well."""
    config = peft.LoraConfig(r=2, trainable_token_indices=ids, **NAMES)
    make = lambda: tiny_llama(tie_word_embeddings=tied)  # noqa: E731
    adapter = has_pefts_logits(make, tmp_path / "peft", config, untouched)
    assert adapter.sites["model.embed_tokens"].ids == (3, 7, 30)  # type: ignore[attr-defined]
    assert ("lm_head" in adapter.sites) == tied


def test_rows_of_tokens_alone(tiny_llama: Make, tmp_path: Path, untouched: Guard) -> None:
    config = peft.TrainableTokensConfig(token_indices=[7, 3])
    adapter = has_pefts_logits(tiny_llama, tmp_path / "peft", config, untouched)
    assert adapter.variant.name == "tokens"
    change_config(tmp_path / "peft", token_indices=[7])
    model = tiny_llama()
    with untouched(model), pytest.raises(ll.AdapterFileError, match=r"2 rows.*names 1 tokens"):
        ll.load(model, tmp_path / "peft")


# --- experts


@pytest.mark.parametrize("family", ["qwen3", "mixtral", "gpt-oss"])
@pytest.mark.parametrize("names", [("gate_up_proj", "down_proj"), ("down_proj",)])
def test_experts(
    mixture: Make, tmp_path: Path, untouched: Guard, family: str, names: tuple[str, ...]
) -> None:
    """Promise: target_parameters are read, whichever way the experts lie, beside linear layers."""
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj"],
        target_parameters=[f"mlp.experts.{name}" for name in names],
    )
    make = lambda: mixture(family)  # noqa: E731
    adapter = has_pefts_logits(make, tmp_path / "peft", config, untouched)
    assert len(adapter.sites) == 2 + 2 * len(names)
    assert {variant.name for variant in adapter.sites.values()} == {"lora"}


def test_square_experts_need_pefts_version(mixture: Make, tmp_path: Path, untouched: Guard) -> None:
    """Promise: where sizes do not tell how the tensors lie, PEFT's version does, or it is refused.

    What version 0.18 called A is Bᵀ, and the other way round.
    """
    targets = ["mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=targets)
    make = lambda: mixture("qwen3", 16)  # noqa: E731
    has_pefts_logits(make, tmp_path / "peft", config, untouched)
    theirs = make()
    ll.load(theirs, tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(file)
    old: dict[str, Tensor] = {}
    for name, b in tensors.items():
        if "lora_B" in name:
            a = tensors[name.replace("lora_B", "lora_A")].reshape(4, 2, 16)
            columns = b.reshape(16, 2, 4).permute(2, 1, 0)  # (experts, r, d_out)
            old[name.replace("lora_B", "lora_A")] = columns.reshape(8, 16).contiguous()
            old[name] = a.permute(2, 1, 0).reshape(16, 8).contiguous()
    save_file(old, file)
    change_config(tmp_path / "peft", peft_version="0.18.1")
    model = make()
    ll.load(model, tmp_path / "peft")
    assert relative(logits(model), logits(theirs)) < TOLERANCE
    for version in (None, "0.19.0"):
        change_config(tmp_path / "peft", peft_version=version)
        model = make()
        with (
            untouched(model),
            pytest.raises(ll.AdapterFileError, match=r"are square.*peft_version"),
        ):
            ll.load(model, tmp_path / "peft")


def test_parameters_that_are_no_experts(tiny_llama: Make, tmp_path: Path, untouched: Guard) -> None:
    targets = ["q_proj.weight"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=targets)
    saved_by_peft(tiny_llama, tmp_path / "peft", config)
    model = tiny_llama()
    with untouched(model), pytest.raises(ll.AdapterFileError, match=r"the parameter .*q_proj\.w"):
        ll.load(model, tmp_path / "peft")


def test_random_matrices_that_were_left_out(tiny_llama: Make, tmp_path: Path) -> None:
    """Promise: a folder without them is refused with a way out; drawn here, they would differ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.VeraConfig(r=3, save_projection=False, **NAMES)
    saved_by_peft(tiny_llama, tmp_path / "peft", config)
    with pytest.raises(ll.AdapterFileError, match=r"without vera_A, vera_B.*save_projection=True"):
        ll.load(tiny_llama(), tmp_path / "peft")
