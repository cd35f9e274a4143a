"""Layers of every kind: convolutions and embeddings, whole modules, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any, ClassVar

import lora_lite as ll
import pytest
import torch
from lora_lite import Rng, Site, Tensors, TensorSpec, Variant
from lora_lite.kinds import OneHot
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

Make = Callable[..., nn.Module]

D_OUT = 8

# A layer and an input for it.
LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "Conv1d": lambda: (nn.Conv1d(4, D_OUT, 3, stride=2, padding=1), torch.randn(2, 4, 9)),
    "Conv2d": lambda: (nn.Conv2d(3, D_OUT, 3, padding=(1, 2)), torch.randn(2, 3, 6, 7)),
    "Conv2d dilated": lambda: (
        nn.Conv2d(3, D_OUT, 3, padding="same", dilation=2),
        torch.randn(2, 3, 6, 7),
    ),
    "Conv2d of one image": lambda: (nn.Conv2d(3, D_OUT, 2, bias=False), torch.randn(3, 5, 6)),
    "Conv3d": lambda: (nn.Conv3d(2, D_OUT, (1, 2, 2), stride=2), torch.randn(2, 2, 3, 4, 5)),
    "Embedding": lambda: (
        nn.Embedding(11, D_OUT, padding_idx=0),
        torch.tensor([[0, 3, 3, 10], [7, 0, 1, 2]]),
    ),
}

# Fields with which every variant fits these layers.
FIELDS: dict[str, dict[str, Any]] = {
    "antipasto": {"r": 4, "block_size": 2},
    "antipasto_ablate": {"r": 4},
    "antipasto_gain": {"r": 4},
    "antipasto_mix": {"r": 4, "k": 2},
    "dora": {"r": 3},
    "delora": {"r": 3},
    "lora": {"r": 3},
    "lora_xs": {"r": 4},
    "pissa": {"r": 3},
    "road": {"group_size": 4},
}
CHANGE_X = ["hra", "ia3_ff"]


class Low(Variant, name="low"):
    """A rank-2 update that starts at 0."""

    dropout: float = 0.0

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {"A": TensorSpec((2, site.d_in)), "B": TensorSpec((site.d_out, 2))}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"A": torch.randn(2, site.d_in, generator=rng("A")), "B": torch.zeros(site.d_out, 2)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return linear(dropout(x, self.dropout, site.training), t["A"]) @ t["B"].T


class Squares(Low, name="squares"):
    """Its delta is not linear in x."""

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return torch.square(x) @ t["A"].T @ t["B"].T


class Replaced(Variant, name="replaced"):
    """New parameters for a module without a weight matrix."""

    replaces_weights: ClassVar[bool] = True

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {name: TensorSpec(tuple(p.shape)) for name, p in site.parameters().items()}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return site.parameters()

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return site.output(x, t) - y


def in_float64(name: str) -> tuple[nn.Sequential, Tensor]:
    layer, x = LAYERS[name]()
    return nn.Sequential(layer).double(), x.double() if x.is_floating_point() else x


def fill(adapter: ll.Adapter) -> None:
    """Give every parameter of an adapter values that are not its start."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            noise = torch.rand(parameter.shape, generator=rng, dtype=torch.float64)
            parameter.add_(0.3 * noise.to(parameter.dtype))
    adapter.project()


# --- what they compute


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("variant", sorted(FIELDS))
def test_the_output_is_that_of_the_written_out_weight(variant: str, name: str) -> None:
    """Every method that leaves x alone computes what the layer computes with W' and b', to 1e-10.

    W' and b' are read off a linear layer with the same W, b and adapter tensors.
    """
    pytest.importorskip(
        f"lora_lite_{variant.partition('_gain')[0].partition('_mix')[0].partition('_ablate')[0]}"
    )
    model, x = in_float64(name)
    layer = model[0]
    adapter = ll.attach(model, variant, targets="0", dtype=torch.float64, **FIELDS[variant])
    fill(adapter)
    y = model(x)

    dense = nn.Sequential(nn.Linear(1, 1)).double()
    w = layer.weight.T if name == "Embedding" else layer.weight.flatten(1)
    bias = getattr(layer, "bias", None)
    dense[0] = nn.Linear(w.shape[1], D_OUT, bias=bias is not None).double()
    with torch.no_grad():
        dense[0].weight.copy_(w)
        if bias is not None:
            dense[0].bias.copy_(bias)
    same = ll.attach(dense, variant, targets="0", dtype=torch.float64, **FIELDS[variant])
    same.load_state_dict(adapter.state_dict())
    with torch.no_grad():
        at_zero = dense(torch.zeros(1, w.shape[1], dtype=torch.float64))
        written_out = (dense(torch.eye(w.shape[1], dtype=torch.float64)) - at_zero).T

    adapter.detach()
    with torch.no_grad():
        untrained = model(x)
        layer.weight.copy_(
            (written_out.T if name == "Embedding" else written_out).reshape(layer.weight.shape)
        )
        expected = model(x)
        shift = at_zero[0] - (0 if bias is None else bias)
        expected = expected + (
            shift if name == "Embedding" else shift.reshape(-1, *[1] * (layer.weight.ndim - 2))
        )
    assert float((y - untrained).detach().abs().max()) > 1e-3
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "Conv3d", "Embedding"])
def test_outputs_and_gradients_equal_pefts(name: str, dtype: torch.dtype) -> None:
    """The same A and B give PEFT's outputs and gradients on convolutions and embeddings.

    Dilated convolutions are left out: PEFT's A is not dilated with its layer.
    """
    peft = pytest.importorskip("peft")
    pytest.importorskip("lora_lite_lora")

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(LAYERS[name]()[0]).to(dtype)

    ours, x = make(), LAYERS[name]()[1]
    x = x.to(dtype) if x.is_floating_point() else x
    adapter = ll.attach(ours, "lora", r=3, alpha=7.0, targets="0", dtype=dtype)
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["0"])
    theirs = peft.get_peft_model(make(), config).to(dtype)
    fill(adapter)
    named = dict(theirs.named_parameters())
    pairs = []
    for key, mine in adapter.named_parameters():
        tensor = key.rpartition(".")[2]
        if name == "Embedding":
            other = named[f"base_model.model.0.lora_embedding_{tensor}.default"]
        else:
            other = named[f"base_model.model.0.lora_{tensor}.default.weight"]
        other.data.copy_(mine.data.reshape(other.shape))
        pairs.append((mine, other))
    weights = torch.randn(ours(x).shape, dtype=dtype)
    outputs = [model(x) for model in (ours, theirs)]
    for output in outputs:
        (output * weights).sum().backward()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    assert float((outputs[0] - make()(x)).detach().abs().max()) > 1e-2
    torch.testing.assert_close(outputs[0], outputs[1], rtol=tolerance, atol=tolerance)
    for mine, other in pairs:
        assert mine.grad is not None
        torch.testing.assert_close(
            mine.grad, other.grad.reshape(mine.shape), rtol=10 * tolerance, atol=10 * tolerance
        )


@pytest.mark.parametrize("name", LAYERS)
def test_they_start_and_end_bit_for_bit(name: str, tmp_path: Path, untouched: Any) -> None:
    """A new adapter changes no bit, a file gives the adapter back, and detach the layer."""
    layer, x = LAYERS[name]()
    model = nn.Sequential(layer)
    before = model(x)
    with untouched(model):
        adapter = ll.attach(model, Low(), targets="0")
        assert torch.equal(model(x), before)
        fill(adapter)
        after = model(x)
        assert not torch.equal(after, before)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), after)
        adapter.save(tmp_path / "file")
        adapter.detach()
        assert torch.equal(model(x), before)
        loaded = ll.load(model, tmp_path / "file", variant=Low)
        assert torch.equal(model(x), after)
        loaded.detach()


@pytest.mark.parametrize("name", LAYERS)
def test_they_compile_whole(name: str) -> None:
    """One graph, with the outputs and gradients of the eager layer."""
    layer, x = LAYERS[name]()
    model = nn.Sequential(layer)
    adapter = ll.attach(model, Low(), targets="0")
    fill(adapter)
    expected = model(x)
    expected.square().sum().backward()
    gradients = [parameter.grad for parameter in adapter.parameters()]
    for parameter in adapter.parameters():
        parameter.grad = None
    output = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    output.square().sum().backward()
    torch.testing.assert_close(output, expected)
    for parameter, gradient in zip(adapter.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_linear_keeps_its_bias_argument() -> None:
    """Of a variant that gives `linear` a bias, nothing is dropped."""

    class Biased(Low, name="biased"):
        def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
            bias = linear(x, t["A"], torch.ones(2)) - linear(x, t["A"])
            return bias.sum(-1, keepdim=True).expand_as(y)

    model = nn.Sequential(nn.Embedding(5, 4))
    ids = torch.tensor([1, 2])
    expected = model(ids) + 2
    ll.attach(model, Biased(), targets="0")
    torch.testing.assert_close(model(ids), expected)


def test_dropout_drops_the_input_of_a_convolution() -> None:
    """In training only, and with the mean kept, as for a linear layer."""
    model = nn.Sequential(nn.Conv1d(1, 2, 1, bias=False))
    adapter = ll.attach(model, Low(dropout=0.5), targets="0")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.fill_(1.0)
    x = torch.ones(1, 1, 20_000)
    delta = model.train()(x) - model[0].weight[:, :, 0]
    assert set(delta.detach().round(decimals=4).unique().tolist()) == {0.0, 4.0}
    assert float(delta.mean().detach()) == pytest.approx(2, abs=0.05)
    torch.testing.assert_close(
        model.eval()(x) - model[0].weight[:, :, 0], torch.full((1, 2, 20_000), 2.0)
    )


# --- which are chosen


class Net(nn.Module):
    """An embedding, blocks with a norm, a linear layer and a convolution, and a convolution."""

    def __init__(self, **convolution: Any) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(
            [
                nn.ModuleDict(
                    {
                        "norm": nn.LayerNorm(8),
                        "fc": nn.Linear(8, 8),
                        "conv": nn.Conv1d(8, 8, 1, **convolution),
                    }
                )
                for _ in range(2)
            ]
        )
        self.out = nn.Conv1d(8, 2, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = x + block["fc"](block["norm"](x))  # type: ignore[index]
            x = x + block["conv"](x.transpose(1, 2)).transpose(1, 2)  # type: ignore[index]
        out: Tensor = self.out(x.transpose(1, 2))
        return out


def chosen(variant: Variant | None = None, **arguments: Any) -> list[str]:
    return [p.path for p in ll.plan(Net(), variant or Low(), **arguments).placements]


def test_by_default_only_linear_layers_are_adapted() -> None:
    """Embeddings, convolutions and norms are asked for by a pattern, each of them."""
    assert chosen() == ["blocks.0.fc", "blocks.1.fc"]
    assert chosen(targets="conv|tokens") == ["tokens", "blocks.0.conv", "blocks.1.conv"]
    assert chosen(targets=r"blocks\.0") == ["blocks.0.fc", "blocks.0.conv"]
    assert chosen(Replaced(), targets="norm") == ["blocks.0.norm", "blocks.1.norm"]
    assert chosen(targets=".", exclude=["blocks", "out"]) == ["tokens"]


def test_a_plan_on_the_meta_device_has_their_shapes() -> None:
    """Patches count channels and kernel, an embedding counts tokens; no weight is read."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 5, (2, 4)), nn.Embedding(7, 6), nn.LayerNorm(9))
    plan = ll.plan(model, {"0": Low(), "1": Low(), "2": Replaced()})
    assert [(p.layer.d_in, p.layer.d_out) for p in plan.placements] == [(24, 5), (7, 6), (1, 18)]
    assert "24 -> 5" in str(plan)


def test_a_norm_is_no_layer_for_a_low_rank_method() -> None:
    """A pattern that matches norms alone matches nothing that such a method could go to."""
    with pytest.raises(ll.TargetError, match=r"matches none of these layers:\n  tokens x 1"):
        chosen(targets="norm")


# --- what is refused


class Shifted(nn.Embedding):
    """Computes something of its own."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 1


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (nn.Conv1d(4, 4, 1, groups=2), "Conv1d with groups=2"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.ConvTranspose1d(4, 4, 1), "is ConvTranspose1d"),
        (nn.Embedding(4, 4, max_norm=1.0), "Embedding with max_norm=1, which rewrites rows"),
        (nn.Embedding(4, 4, sparse=True), "Embedding with sparse=True"),
        (nn.Embedding(4, 4, scale_grad_by_freq=True), "Embedding with scale_grad_by_freq=True"),
        (nn.EmbeddingBag(4, 4), "is EmbeddingBag"),
        (Shifted(4, 4), "is Shifted with a forward of its own"),
        (nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 1)), "is ParametrizationList"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_that_are_not_read_say_why(odd: nn.Module, reason: str, untouched: Any) -> None:
    """Asked for by name it is an error; beside others a warning; with exclude= neither."""
    model = nn.ModuleList([nn.ModuleDict({"odd": odd, "plain": nn.Linear(4, 4)})])
    with untouched(model), pytest.raises(ll.TargetError) as caught:
        ll.attach(model, Low(), targets="odd")
    assert reason in str(caught.value)
    with pytest.warns(ll.AdapterWarning, match="matches weights that get no adapter") as warned:
        ll.attach(model, Low(), targets="0").detach()
    assert reason in str(warned[0].message)
    ll.attach(model, Low(), targets="0", exclude="odd").detach()


@pytest.mark.parametrize("variant", CHANGE_X)
@pytest.mark.parametrize("name", ["Conv2d", "Embedding"])
def test_methods_that_change_x_do_not_fit(variant: str, name: str, untouched: Any) -> None:
    """There is no x there to be changed: a misfit with the layer's path."""
    pytest.importorskip(f"lora_lite_{variant.removesuffix('_ff')}")
    model, _ = in_float64(name)
    with (
        untouched(model),
        pytest.raises(ll.MisfitError, match=rf"0 \({name}\): {variant} changes x"),
    ):
        ll.attach(model, variant, targets="0")


def test_methods_that_observe_x_do_not_fit(untouched: Any) -> None:
    """Calibration would need the rows themselves."""
    pytest.importorskip("lora_lite_eva")
    model, ids = in_float64("Embedding")
    with untouched(model), pytest.raises(ll.CalibrationError, match="eva observes the inputs of 0"):
        ll.attach(model, "eva", r=2, targets="0", calibration=[ids])


def test_anything_else_that_a_variant_does_with_rows_is_named() -> None:
    """The error says which function was called, and that such layers can be left out."""
    model, ids = in_float64("Embedding")
    ll.attach(model, Squares(), targets="0")
    with pytest.raises(ll.AdapterError, match=r"calls square(?s:.*)exclude="):
        model(ids)


def test_dropout_of_token_ids_is_refused_in_training() -> None:
    """A part of an id cannot be dropped; in eval mode dropout does nothing anyway."""
    model, ids = in_float64("Embedding")
    ll.attach(model.eval(), Low(dropout=0.5), targets="0")
    model(ids)
    with pytest.raises(ll.AdapterError, match=r"dropout of 0\.5(?s:.*)overrides="):
        model.train()(ids)


# --- other linear layers


def test_falcons_linear_layers() -> None:
    """Its class writes out the product; lora-lite reads it like any other linear layer."""
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.FalconForCausalLM(config).eval()
    ids = torch.randint(32, (2, 5))
    before = model(input_ids=ids).logits
    adapter = ll.attach(model, Low())
    assert len(adapter.sites) == 8
    assert torch.equal(model(input_ids=ids).logits, before)
    fill(adapter)
    ll.check(model, {"input_ids": ids})
    site = next(iter(adapter.sites))
    values = {key: p.detach() for key, p in adapter.named_parameters()}
    after = model(input_ids=ids).logits
    adapter.detach()
    for path in {key.rpartition(".")[0] for key in values}:
        model.get_submodule(path).weight.data += values[f"{path}.B"] @ values[f"{path}.A"]
    assert site in {key.rpartition(".")[0] for key in values}
    torch.testing.assert_close(model(input_ids=ids).logits, after, rtol=1e-4, atol=1e-4)


def test_scaled_embeddings_of_transformers() -> None:
    """Gemma's multiplies what it looks up; W is the table as the model sees it, times that."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3TextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    embedding = transformers.Gemma3ForCausalLM(config).model.embed_tokens
    model = nn.Sequential(embedding)
    ids = torch.randint(1, 32, (2, 5))
    before = model(ids)
    adapter = ll.attach(model, Low(), targets="0")
    torch.testing.assert_close(
        before, ll.plan(model, Low(), targets="0").placements[0].site.weight().T[ids]
    )
    assert torch.equal(model(ids), before)
    fill(adapter)
    a, b = (parameter.detach() for _, parameter in sorted(adapter.named_parameters()))
    torch.testing.assert_close(model(ids), before + (b @ a).T[ids])


# --- whole modules


class Gated(nn.Module):
    """A norm that is called with two tensors, one of them by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 4))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return self.scaled(nn.functional.normalize(x, dim=-1)) * gate

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.weight


class Holder(nn.Module):
    """Calls a gated norm, and a batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.gated = Gated()
        self.batch = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.batch(self.gated(x, gate=torch.sigmoid(x)))
        return out


def test_the_share_of_the_weights_counts_whole_modules() -> None:
    """All of a model is 100 % of it, whatever its layers are."""
    model = Net()
    adapter = ll.attach(model, {"norm": Replaced(), "fc|conv|tokens|out": Low()})
    assert "100 % of the weights" in repr(adapter)


def test_a_whole_module_runs_with_the_new_parameters() -> None:
    """Whatever it is called with, and by whichever of its methods it reads them."""
    x = torch.randn(3, 4)
    model, other = Holder().eval(), Holder().eval()
    before = model(x)
    adapter = ll.attach(model, Replaced(), targets="gated|batch")
    assert torch.equal(model(x), before)
    fill(adapter)
    values = {key: p.detach() for key, p in adapter.named_parameters()}
    assert set(values) == {"gated.weight", "batch.weight", "batch.bias"}
    other.load_state_dict(values, strict=False)
    torch.testing.assert_close(model(x), other(x))


@pytest.mark.parametrize("wrap", ["method", "partial"])
def test_a_forward_that_a_tool_has_put_on_a_module_is_no_trap(wrap: str) -> None:
    """Kernels replace a module's forward by a method, accelerate by a partial; both are bound."""
    model, other = Holder().eval(), Holder().eval()
    x = torch.randn(3, 4)
    gated = model.gated
    if wrap == "method":
        gated.forward = MethodType(Gated.forward, gated)  # type: ignore[method-assign]
    else:
        gated.forward = partial(Gated.forward, gated)  # type: ignore[method-assign]
    adapter = ll.attach(model, Replaced(), targets="gated")
    assert torch.equal(model(x), other(x))
    fill(adapter)
    (weight,) = adapter.parameters()
    other.gated.weight.data.copy_(weight.data)
    torch.testing.assert_close(model(x), other(x))


def test_the_statistics_of_a_batch_normalisation_move_once() -> None:
    """The second run with new parameters works on copies of the buffers."""
    model, other = Holder().train(), Holder().train()
    x = torch.randn(6, 4)
    ll.attach(model, Replaced(), targets="batch")
    model(x)
    other(x)
    assert torch.equal(model.batch.running_mean, other.batch.running_mean)
    assert model.batch.num_batches_tracked == other.batch.num_batches_tracked == 1


def test_two_adapters_on_one_module_do_not_see_each_other() -> None:
    """The tensors of the first are no parameters of the module for the second."""
    model = Holder()
    ll.attach(model, Replaced(), targets="gated", name="one")
    two = ll.attach(model, Replaced(), targets="gated", name="two")
    assert [key for key, _ in two.named_parameters()] == ["gated.weight"]


def test_a_whole_module_compiles(tmp_path: Path) -> None:
    """One graph; and a file, a copy and a pickle of it give the same bits."""
    model = Holder().eval()
    x = torch.randn(3, 4)
    adapter = ll.attach(model, Replaced(), targets="gated|batch")
    fill(adapter)
    after = model(x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), after)
    adapter.save(tmp_path / "file")
    assert torch.equal(copy.deepcopy(model)(x), after)
    adapter.detach()
    ll.load(model, tmp_path / "file", variant=Replaced)
    assert torch.equal(model(x), after)


def test_a_module_that_returns_several_tensors_is_named() -> None:
    """It is seen when it is first called, with its class."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * self.weight, x

    model = nn.Sequential(Two())
    ll.attach(model, Replaced(), targets="0")
    with pytest.raises(ll.AdapterError, match=r"Two returns tuple(?s:.*)exclude="):
        model(torch.ones(4))


def test_the_base_is_no_matter_to_a_variant_that_replaces_it(tmp_path: Path) -> None:
    """No fingerprint, and neither error nor warning on a base that is another one there."""
    model, other = Holder().eval(), Holder().eval()
    adapter = ll.attach(model, Replaced(), targets="gated|batch")
    fill(adapter)
    adapter.save(tmp_path / "file")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    ll.load(other, tmp_path / "file", variant=Replaced)
    x = torch.randn(3, 4)
    torch.testing.assert_close(other(x), model(x))


def test_an_embedding_shows_its_ids() -> None:
    """A variant asks `site.reads_ids`, and finds them at `x.ids`."""
    seen: list[Any] = []

    class Looks(Low, name="looks"):
        def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
            seen.append((site.reads_ids, x))
            return torch.zeros_like(y)

    model = nn.Sequential(nn.Embedding(5, 4))
    ids = torch.tensor([[1, 2, 4]])
    ll.attach(model, Looks(), targets="0")
    model(ids)
    reads_ids, x = seen[0]
    assert reads_ids
    assert isinstance(x, OneHot)
    assert torch.equal(x.ids, ids)
    assert x.shape == (1, 3, 5)
