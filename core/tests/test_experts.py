"""The experts of a mixture that are kept as one parameter: an adapter of its own for each expert.

Models are those of transformers, small and random, in the ways in which it computes experts.
"""

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
import transformers
from lora_lite.ragged import Groups, NotRaggedError, Ragged, grouped_product
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

EXPERTS = r"experts\.(gate_up_proj|down_proj|(in|out)put_linear\.weight)$"
WAYS = ("eager", "batched_mm", "grouped_mm")
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 12, "num_experts": 5, "head_dim": 8},
    "mixtral": {"intermediate_size": 12, "num_local_experts": 5},
    "gpt_oss": {"intermediate_size": 12, "num_local_experts": 5, "head_dim": 8},
    "deepseek_v3": {
        "intermediate_size": 12,
        "moe_intermediate_size": 12,
        "n_routed_experts": 6,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "llama4_text": {
        "intermediate_size": 12,
        "intermediate_size_mlp": 24,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 1,
        "head_dim": 8,
        "pad_token_id": 0,
    },
    "jetmoe": {"intermediate_size": 12, "num_local_experts": 4, "kv_channels": 4},
    "phimoe": {"intermediate_size": 12, "num_local_experts": 4},
    "qwen3_next": {
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 12,
        "num_experts": 5,
        "head_dim": 8,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3},
    "pissa": {"r": 3},
    "dora": {"r": 3},
    "delora": {"r": 3},
    "hra": {"r": 4},
    "ia3": {},
    "ia3_ff": {},
    "lora_xs": {"r": 3},
    "road": {"group_size": 4},
    "antipasto": {"r": 4, "rotate_basis": "both"},
    "antipasto_gain": {"r": 4},
    "antipasto_ablate": {"r": 4, "k": 2},
    "antipasto_mix": {"r": 4, "k": 2},
}
IDS = torch.arange(18).reshape(2, 9)


def mixture(family: str = "qwen3_moe", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random model with weights of a size at which experts matter."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


def moved(adapter: ll.Adapter) -> ll.Adapter:
    """Off its start."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng).to(parameter))
    adapter.project()
    return adapter


def attached(model: nn.Module, variant: str = "lora", **options: Any) -> ll.Adapter:
    dtype = next(model.parameters()).dtype
    fields = VARIANTS[variant]
    return ll.attach(model, variant, targets=EXPERTS, dtype=dtype, **fields, **options)


def holders(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The path and module of every parameter that holds experts, and the parameter's name."""
    for path, module in model.named_modules():
        for name in ("gate_up_proj", "down_proj"):
            if module._parameters.get(name) is not None:
                yield f"{path}.{name}", module, name


class Alone(nn.Module):
    """One expert as the linear layer that it is."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype)
        self.layer.weight.data.copy_(weight)


@torch.no_grad()
def write_out(model: nn.Module, adapter: ll.Adapter, fields: dict[str, Any]) -> nn.Module:
    """A copy of the model with the change of every expert added to its weight.

    Each change is that of the variant on a linear layer with the expert's weight and tensors.
    """
    state, name = adapter.state_dict(), adapter.variant.name
    plain = copy.deepcopy(model)
    ll.detach(plain)
    for path, module, parameter in holders(plain):
        stack = module._parameters[parameter]
        assert stack is not None
        for expert in range(len(stack)):
            weight = stack[expert].T if module.is_transposed else stack[expert]
            alone = Alone(weight)
            one = ll.attach(alone, name, targets="layer", dtype=weight.dtype, **fields)
            own = {key.rpartition(".")[2]: value for key, value in state.items() if path in key}
            one.load_state_dict({f"layer.{key}": value[expert] for key, value in own.items()})
            weight.copy_(one.merged()["layer"].weight)
    return plain


# --- what is computed


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_each_expert_has_the_change_of_a_linear_layer(variant: str, family: str) -> None:
    """Promise: an adapter on experts computes what the variant computes on a linear layer with one
    expert's weight, for every expert and in every way to compute them."""
    model = mixture(family, torch.float64)
    model.set_experts_implementation("eager")
    before = logits(model)
    adapter = moved(attached(model, variant))
    expected = logits(write_out(model, adapter, VARIANTS[variant]))
    assert (expected - before).abs().max() > 1e-3
    for way in ("eager", "batched_mm"):
        model.set_experts_implementation(way)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_ways_to_compute_experts_agree(variant: str) -> None:
    """Promise: outputs and gradients are those of one expert after the other, up to rounding."""
    model = mixture()
    adapter = moved(attached(model, variant))
    found = {}
    for way in WAYS:
        model.set_experts_implementation(way)
        model.zero_grad()
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        gradients = [p.grad.flatten() for p in adapter.parameters() if p.grad is not None]
        found[way] = (out.logits.detach(), torch.cat(gradients))
    for way in WAYS[1:]:
        for value, expected in zip(found[way], found["eager"], strict=True):
            size = float(expected.abs().max())
            torch.testing.assert_close(value, expected, rtol=0, atol=2e-5 * size)


def test_peft_computes_the_same() -> None:
    """Parity: PEFT's `target_parameters`, which writes W + B A for all experts in every forward."""
    import peft

    ours, theirs = mixture(), mixture()
    adapter = moved(ll.attach(ours, "lora", r=3, alpha=3, targets=EXPERTS))
    names = [path for path, _, _ in holders(theirs)]
    config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=[], target_parameters=names)
    wrapped = peft.get_peft_model(theirs, config)
    state = adapter.state_dict()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            path = next(path for path in names if _belongs(name, path))
            ours_is = state[f"{path}.{'A' if 'lora_A' in name else 'B'}"]
            # A: (experts · r, d_in); B: (d_out, r · experts), an expert's columns r apart
            flat = (
                ours_is.flatten(0, 1) if "lora_A" in name else ours_is.permute(1, 2, 0).flatten(1)
            )
            parameter.data.copy_(flat)
    torch.testing.assert_close(logits(ours), logits(wrapped), rtol=0, atol=2e-5)


def _belongs(name: str, path: str) -> bool:
    """Whether a tensor of PEFT, which nests two layers, is that of a parameter of ours."""
    block = path.split(".experts")[0]
    inner = "base_layer.lora_" in name
    return block in name and path.endswith("gate_up_proj") == inner


def test_factors_and_merged_weights_of_every_expert(tmp_path: Path) -> None:
    """Promise: low_rank and merged tell the change of each expert; a merged checkpoint computes
    what the adapted model does, and knows nothing of lora-lite."""
    for family in ("qwen3_moe", "gpt_oss"):
        model = mixture(family)
        adapter = moved(attached(model))
        state, factors, merged = adapter.state_dict(), adapter.low_rank(), adapter.merged()
        path = "model.layers.1.mlp.experts.down_proj"
        product = 16 / 3 * (state[f"{path}.B"][4] @ state[f"{path}.A"][4])
        found = factors[f"{path}[4]"]
        torch.testing.assert_close((found.B @ found.A).float(), product)
        weights = model.get_parameter(path)[4]
        weights = weights.T if family == "gpt_oss" else weights
        torch.testing.assert_close(merged[f"{path}[4]"].weight, weights + product)
        adapter.save(tmp_path / family, format="merged")
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / family)
        torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-5)


# --- what holds for every layer


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_on_experts_is_an_adapter(family: str, tmp_path: Path) -> None:
    """Promises: a start and a detach that change no bit, a file that gives back the same bits, a
    copy and a pickle that are the same, two adapters that add up, switches."""
    model = mixture(family)
    before, plain = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    adapter = attached(model, "antipasto")
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    moved(adapter)
    after = logits(model)
    assert not torch.equal(after, before)
    adapter.save(tmp_path / "full")
    adapter.save(tmp_path / "slim", derived=False)
    assert torch.equal(logits(copy.deepcopy(model)), after)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), after)
    with adapter.disabled():
        assert torch.equal(logits(model), before)
    with adapter.frozen(), torch.no_grad():
        assert torch.equal(logits(model), after)
        assert torch.equal(logits(model), after)
    second = moved(ll.attach(model, "lora", r=2, targets=EXPERTS, name="second"))
    assert not torch.equal(logits(model), after)
    second.detach()
    assert torch.equal(logits(model), after)
    adapter.detach()
    assert torch.equal(logits(model), before)
    assert model.state_dict().keys() == plain.keys()
    assert all(torch.equal(value, plain[key]) for key, value in model.state_dict().items())
    for file in ("full", "slim"):
        loaded = ll.load(model, tmp_path / file)
        assert torch.equal(logits(model), after)
        loaded.restore(tmp_path / "full")
        loaded.detach()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
def test_training_goes_through_the_stand_in() -> None:
    """Promises: every expert that a token chose gets a gradient; gradient checkpointing gives the
    same bits; `check` is content; the next forward of a failed one is right."""
    model = mixture().train()
    adapter = moved(attached(model))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in adapter.parameters() if p.grad is not None]

    expected = gradients()
    assert len(expected) == 8
    assert all(bool(gradient.any()) for gradient in expected)
    model.gradient_checkpointing_enable()
    assert all(map(torch.equal, gradients(), expected))
    model.gradient_checkpointing_disable()
    assert ll.check(model, {"input_ids": IDS, "labels": IDS}).parameters == 8
    before = logits(model)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    act, experts.act_fn = experts.act_fn, None
    with pytest.raises(TypeError):
        logits(model)
    experts.act_fn = act
    assert "gate_up_proj" not in experts.__dict__
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("way", ["batched_mm", "grouped_mm"])
def test_experts_compile_into_one_graph(way: str) -> None:
    """Promise: torch.compile traces the model whole, and once for all steps of an optimizer."""
    model = mixture()
    model.set_experts_implementation(way)
    adapter = moved(attached(model))
    expected, counter = logits(model), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        out = compiled(input_ids=IDS).logits
        torch.testing.assert_close(out, expected)
        out.sum().backward()
        moved(adapter)
        expected = logits(model)
    assert counter.frame_count == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_leaves_experts_and_routers_alone(family: str) -> None:
    """Promise: a mixture can be adapted without naming anything, whatever its router is; that the
    experts stay frozen is told."""
    model = mixture(family)
    with pytest.warns(ll.AdapterWarning, match=r"experts stay frozen[\s\S]*targets="):
        adapter = ll.attach(model, "lora", r=2)
    alone = re.compile(r"\.experts\.(gate_up|down)_proj$|router$|gate$|put_linear\.weight$")
    assert not [path for path in adapter.sites if alone.search(path)]


def test_a_stack_of_which_the_sides_are_not_known_stays_out_of_reach() -> None:
    """Promise: where sizes do not tell rows from columns, nothing is guessed."""

    class Square(nn.Module):
        pass

    square = Square()
    square.num_experts, square.hidden_size = 3, 8
    square.gate_up_proj = nn.Parameter(torch.randn(3, 8, 8))
    square.down_proj = nn.Parameter(torch.randn(3, 4, 8))
    model = nn.ModuleDict({"experts": square, "layers": nn.ModuleList([nn.Linear(8, 8)])})
    plan = ll.plan(model, "lora", r=2, targets=["down_proj", "layers"])
    assert [p.path for p in plan.placements] == ["experts.down_proj", "layers.0"]
    assert (plan.placements[0].layer.d_in, plan.placements[0].layer.d_out) == (4, 8)
    assert any("gate_up_proj" in sentence for sentence in plan.unreachable)


def test_a_plan_counts_a_large_mixture() -> None:
    """Promise: parameters and costs of a model of 30 billion, without its weights."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48, num_experts=128,
        num_experts_per_tok=8, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        vocab_size=151936,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    plan = ll.plan(model, "lora", r=8, targets=EXPERTS)
    one_expert = 8 * ((2048 + 2 * 768) + (768 + 2048))
    assert plan.parameters == 48 * 128 * one_expert
    assert plan.macs_per_token == 48 * 8 * one_expert
    assert all("gate.weight" in sentence for sentence in plan.unreachable)


# --- what is refused


def test_a_variant_that_needs_data_is_refused_by_name() -> None:
    with pytest.raises(ll.MisfitError, match="calibration data of every expert"):
        ll.plan(mixture(), "eva", r=2, targets=EXPERTS)


def test_formats_for_linear_layers_refuse_experts(tmp_path: Path) -> None:
    adapter = attached(mixture())
    with pytest.raises(ll.AdapterError, match=r"linear layers alone[\s\S]*experts\.gate_up_proj"):
        adapter.save(tmp_path / "gguf", format="gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "use",
    [
        lambda experts: experts.gate_up_proj * 2,
        lambda experts: torch.einsum("end,tn->etd", experts.gate_up_proj, IDS.float()),
        lambda experts: experts.gate_up_proj.sum(),
        lambda experts: torch.nn.functional.linear(torch.ones(3, 16), experts.gate_up_proj),
    ],
)
def test_another_use_of_the_weights_is_an_error(use: Callable[[Any], Any]) -> None:
    """Promise: a forward that uses the experts in a way that is not known is refused, and is not
    computed without the adapter."""

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.is_transposed = False
            self.gate_up_proj = nn.Parameter(torch.randn(4, 6, 16))

        def forward(self) -> Any:
            return use(self)

    model = nn.ModuleDict({"experts": Other()})
    ll.attach(model, "lora", r=2, targets="gate_up_proj")
    with pytest.raises((ll.AdapterError, TypeError), match=r"not know|unsupported operand"):
        model["experts"]()
    assert "gate_up_proj" not in model["experts"].__dict__


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("_experts_implementation", "sonicmoe", "'sonicmoe'.*grouped_mm"),
        ("_is_expert_parallel", True, "expert parallelism"),
    ],
)
def test_kernels_that_would_pass_the_adapter_by_are_refused(
    name: str, value: Any, told: str
) -> None:
    model = mixture()
    attached(model)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    setattr(experts.config if name.startswith("_experts") else experts, name, value)
    with pytest.raises(ll.AdapterError, match=told):
        logits(model)


# --- rows of several experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sizes", [(3, 5), (8, 16)])
def test_a_grouped_product_is_that_of_every_expert(
    dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    """Promise: for all dtypes and sizes, with experts that have no rows, and gradients."""
    rows, matrices = torch.randn(7, sizes[0]).to(dtype), torch.randn(4, *sizes).to(dtype)
    rows.requires_grad_()
    ends = torch.tensor([2, 2, 6, 7], dtype=torch.int32)
    found = grouped_product(rows, matrices, ends)
    expected = torch.cat([rows[:2] @ matrices[0], rows[2:6] @ matrices[2], rows[6:] @ matrices[3]])
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    (gradient,) = torch.autograd.grad(found, rows, weights)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, rows, weights)[0])


def test_what_cannot_be_done_for_all_experts_is_said() -> None:
    """Promise: `Ragged` gives right values or says that it cannot; it does not guess."""
    groups = Groups(torch.tensor([0, 0, 1]), torch.tensor([2, 3], dtype=torch.int32))
    vectors, rows = torch.randn(2, 4), torch.randn(3, 4)
    ragged = Ragged(vectors, groups)
    each = vectors[groups.ids]
    for found, expected in [
        (ragged * rows, each * rows),
        (rows - ragged, rows - each),
        (2 - ragged + rows, 2 - each + rows),
        (1 / ragged + rows, 1 / each + rows),
        (torch.nn.functional.elu(ragged) * rows, torch.nn.functional.elu(each) * rows),
        ((ragged / (ragged**2 + 1)).to(torch.float32) * rows, each / (each**2 + 1) * rows),
    ]:
        torch.testing.assert_close(found, expected)
    for ask in (lambda: ragged[0], lambda: ragged.cumsum(0), lambda: torch.cat([ragged, ragged])):
        with pytest.raises(NotRaggedError):
            ask()
