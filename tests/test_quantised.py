"""Quantised bases, with bitsandbytes on the CPU: every variant on 4-bit and 8-bit layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite import fileformat
from lora_lite.author import LayerKindError
from lora_lite.plugins import variant_class
from lora_lite.testing.case import move
from torch import Tensor, nn

bitsandbytes = pytest.importorskip("bitsandbytes")
from bitsandbytes.nn import Linear4bit, Linear8bitLt  # noqa: E402
from lora_lite_bitsandbytes import BitsAndBytes, trainer_accepts  # noqa: E402

FORMATS: dict[str, Callable[..., nn.Module]] = {
    "nf4": lambda *shape: Linear4bit(*shape, quant_type="nf4", compress_statistics=False),
    "nf4-double": lambda *shape: Linear4bit(*shape, quant_type="nf4", compress_statistics=True),
    "fp4": lambda *shape: Linear4bit(*shape, quant_type="fp4", compress_statistics=False),
    "int8": lambda *shape: Linear8bitLt(*shape, has_fp16_weights=False),
    "int8-outliers": lambda *shape: Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0),
}
FOUR_BIT = [name for name in FORMATS if "4" in name]
TARGETS = r"\.(up|down)$"
KIND = BitsAndBytes()

PACKS = bool(getattr(Linear4bit(64, 64), "support_avx512bf16_for_cpu", False))
avx512bf16 = pytest.mark.skipif(not PACKS, reason="only CPUs with AVX512-bf16 pack 4-bit layers")


def quantised(layer: nn.Module, name: str) -> nn.Module:
    """A quantised copy of an `nn.Linear`."""
    assert isinstance(layer, nn.Linear)
    new = FORMATS[name](layer.in_features, layer.out_features, layer.bias is not None).to(
        layer.weight.dtype
    )
    with torch.no_grad():
        new.weight.copy_(layer.weight)  # type: ignore[operator, union-attr]
        if layer.bias is not None:
            new.bias.copy_(layer.bias)  # type: ignore[operator, union-attr]
    return new.to("cpu")


@pytest.fixture
def base(blocks: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Makes the same base each time, as it is (`None`) or with its blocks quantised afresh.

    It is in training mode, where no CPU packs a layer.
    """

    def make(name: str | None, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = blocks(depth=2, width=64, hidden=128).to(dtype)
        for path, layer in list(model.named_modules()):
            if name is not None and path.endswith(("up", "down")):
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, quantised(layer, name))
        return model.train()

    return make


def inputs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)


# What fits layers of 64 and 128, and perturbed values that do not grow from layer to layer.
SMALL: dict[str, dict[str, Any]] = {
    "vb_lora": {"length": 16, "vectors": 16},
    "randlora": {"alpha": 0.1},
}


def attach(model: nn.Module, variant: str, **options: Any) -> ll.Adapter:
    """At rank 8, with calibration data where the variant asks for it."""
    cls = variant_class(variant)
    fields = {"r": 8, **SMALL.get(variant, {})}
    chosen = cls(**{name: value for name, value in fields.items() if name in cls.model_fields})
    placements = ll.plan(model, chosen, targets=TARGETS).placements
    observers = [p.variant.observe(p.site) for p in placements]
    if any(observer is not None for observer in observers):
        options["calibration"] = [inputs(4, 16, seed=90 + i) for i in range(3)]
    if any(getattr(observer, "wants_gradients", False) for observer in observers):
        options["loss"] = lambda output, _batch: output.square().mean()
    return ll.attach(model, chosen, targets=TARGETS, **options)


def state(model: nn.Module) -> dict[str, Any]:
    """Every bit of a model and of its layers' quantised state, every attribute, every hook."""
    seen: dict[str, Any] = {key: value.clone() for key, value in model.state_dict().items()}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            seen[f"{path} {name}"] = (
                len(value) if name.startswith("_") and isinstance(value, dict) else value
            )
        for name, parameter in module.named_parameters(recurse=False):
            seen[f"{path} {name}"] = (
                parameter.detach().clone(),
                parameter.requires_grad,
                dict(vars(parameter)),
            )
    return seen


def same(a: Any, b: Any) -> bool:
    """Equality down to the tensors in nested containers and objects."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, nn.Module):
        return type(a) is type(b)
    return same(vars(a), vars(b)) if hasattr(a, "__dict__") else a == b


def assert_same_base(model: nn.Module, control: nn.Module) -> None:
    """The model is bit for bit the control, and so is what it computes."""
    with torch.no_grad():
        assert torch.equal(model(inputs(3, 5)), control(inputs(3, 5)))
    seen, expected = state(model), state(control)
    assert seen.keys() == expected.keys()
    assert not [key for key in expected if not same(seen[key], expected[key])]


def loss_of(model: nn.Module, target: Tensor) -> Tensor:
    return (model(inputs(8, 4)) - target).square().mean()


def fit(
    model: nn.Module, adapter: ll.Adapter, target: Tensor, steps: int = 12
) -> tuple[float, float]:
    """The loss before and after a short training."""
    optimizer = torch.optim.Adam(adapter.param_groups(), lr=1e-2)
    adapter.project_after(optimizer)
    before = float(loss_of(model, target).detach())
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, target).backward()
        optimizer.step()
    return before, float(loss_of(model, target).detach())


every_variant = pytest.mark.parametrize("variant", sorted(ll.variants()))
every_format = pytest.mark.parametrize("name", FORMATS)


# --- every variant on every format


@every_format
@every_variant
def test_a_variant_starts_trains_and_leaves(
    base: Callable[..., nn.Module], variant: str, name: str
) -> None:
    """On a quantised base a variant starts as the base, passes gradients, and lowers a loss.

    Gradients reach its parameters and the input. Every bit of the base is left as an unattached
    control has it.
    """
    model, control, teacher = base(name), base(name), base(name)
    x = inputs(3, 5)
    adapter = attach(model, variant)
    if adapter.variant.identity != "none":
        torch.testing.assert_close(
            model(x), control(x), rtol=0, atol=0 if adapter.variant.identity == "exact" else 1e-5
        )
    move(attach(teacher, variant), 0.3, seed=1)
    target = teacher(inputs(8, 4)).detach()
    before, after = fit(model, adapter, target)
    assert after < 0.9 * before
    x = inputs(3, 5).requires_grad_()
    model.eval()(x).sum().backward()
    assert x.grad is not None
    assert all(
        p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in adapter.parameters()
    )
    adapter.detach()
    assert torch.equal(model(x), control.eval()(x))
    assert_same_base(model.train(), control.train())


@every_format
@every_variant
def test_a_file_goes_back_onto_a_base_quantised_afresh(
    base: Callable[..., nn.Module], variant: str, name: str, tmp_path: Path
) -> None:
    """Bit for bit, and without a word about the base."""
    model, again = base(name), base(name)
    adapter = attach(model, variant)
    move(adapter, 0.1, seed=1)
    adapter.save(tmp_path / "a.safetensors")
    loaded = ll.load(again, tmp_path / "a.safetensors")
    assert same(loaded.state_dict(), adapter.state_dict())
    assert torch.equal(again(inputs(3, 5)), model(inputs(3, 5)))


@every_format
@every_variant
def test_a_file_on_the_unquantised_base(
    base: Callable[..., nn.Module], variant: str, name: str, tmp_path: Path
) -> None:
    """A warning where the tensors do not come from the base, else an error.

    check_base=False overrides both.
    """
    model, dense, plain = base(name), base(None), base(None)
    adapter = attach(model, variant)
    move(adapter, 0.1, seed=1)
    adapter.save(file := tmp_path / "a.safetensors")
    if variant_class(variant).replaces_weights:
        ll.load(dense, file)  # its tensors are whole weights, whatever the base has
    elif fileformat.read(file)[0].uses_base:
        with pytest.raises(ll.BaseMismatchError) as caught:
            ll.load(dense, file)
        assert caught.value.path == str(file)
        assert_same_base(dense, plain)
        ll.load(dense, file, check_base=False)
    else:
        with pytest.warns(ll.AdapterWarning, match="other weights"):
            ll.load(dense, file)
    x = inputs(3, 5)
    change, original = dense(x) - plain(x), model(x) - base(name)(x)
    assert bool((change - original).norm() < 0.25 * original.norm())


def test_which_variants_need_their_base(base: Callable[..., nn.Module], tmp_path: Path) -> None:
    needs = {}
    for variant in ("lora", "ia3", "pissa", "dora", "antipasto"):
        attach(base("nf4"), variant).save(file := tmp_path / variant)
        needs[variant] = fileformat.read(file)[0].uses_base
    assert needs == {"lora": False, "ia3": False, "pissa": True, "dora": True, "antipasto": True}


# --- what the kind reads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 128), (128, 48), (192, 7)])
@every_format
def test_the_weight_is_what_the_layer_multiplies_with(
    name: str, shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read whole and in blocks of a few rows; before and after the first forward.

    That forward moves an 8-bit layer's scales.
    """
    layer = quantised(nn.Linear(*shape).to(dtype), name).train()
    eye = torch.eye(shape[0], dtype=dtype)
    w = KIND.weight(layer)
    seen = layer(eye) - KIND.bias(layer)  # type: ignore[operator]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(w.T, seen.float(), rtol=tolerance, atol=tolerance)
    m = torch.randn(3, shape[0], dtype=dtype)
    monkeypatch.setattr("lora_lite_bitsandbytes.kind.BLOCK", 5 * shape[0])
    assert torch.equal(KIND.weight(layer), w)
    torch.testing.assert_close(KIND.matmul(layer, m), (m.float() @ w.T).to(dtype))
    assert KIND.matmul(layer, m.double()).dtype == torch.float64
    assert KIND.shape(layer) == shape
    assert w.dtype == torch.float32
    assert KIND.dtype(layer) == (dtype if name in FOUR_BIT else torch.float32)


def test_the_weight_of_8_bit_training_from_scratch_is_dense() -> None:
    """`has_fp16_weights=True` (bitsandbytes' default) keeps W and quantises it for each product."""
    layer = Linear8bitLt(8, 6)
    assert torch.equal(KIND.weight(layer), layer.weight.detach().float())
    ll.attach(nn.ModuleList([layer]), "pissa", r=2).detach()


def test_codes_stored_as_another_dtype() -> None:
    """As for FSDP, with `quant_storage`."""
    dense = nn.Linear(64, 32)
    layers = [
        Linear4bit(64, 32, quant_type="nf4", quant_storage=dtype)
        for dtype in (torch.uint8, torch.bfloat16)
    ]
    for layer in layers:
        layer.weight.data.copy_(dense.weight)
        layer.to("cpu")
    assert torch.equal(KIND.weight(layers[0]), KIND.weight(layers[1]))


@pytest.mark.parametrize(
    "cls", [Linear4bit, partial(Linear8bitLt, has_fp16_weights=False)], ids=["4-bit", "8-bit"]
)
def test_a_layer_that_is_still_to_be_quantised(cls: Callable[..., nn.Module]) -> None:
    """It cannot run, or would change at its first forward: refused by name, with the way out.

    Elsewhere in the model it is no trouble, and `plan` reads its shape on the meta device.
    """
    model = nn.ModuleList([cls(64, 32), nn.Linear(64, 32)])
    with pytest.raises(LayerKindError, match=r"not quantised yet.*Call model\.to\(device\)"):
        ll.attach(model, "lora", r=2, targets="0")
    ll.attach(model, "lora", r=2, targets="1").detach()
    with torch.device("meta"):
        assert (
            ll.plan(nn.ModuleList([cls(64, 32)]), "dora", r=2, targets="0").parameters
            == 2 * 96 + 32
        )


@pytest.mark.parametrize("name", FOUR_BIT)
def test_a_shape_that_the_kernel_gets_wrong_is_refused(name: str) -> None:
    """Where rows of W do not hold whole blocks, W is right all the same.

    A layer that computes with another W is refused.
    """
    dense = nn.Linear(96, 40, bias=False)
    layer = quantised(dense, name).train()
    torch.testing.assert_close(
        KIND.weight(layer),
        dense.weight.detach(),
        rtol=0,
        atol=0.25 * float(dense.weight.detach().abs().max()),
    )
    wrong = not torch.allclose(layer(torch.eye(96)).T, KIND.weight(layer), atol=1e-5)
    if wrong:
        with pytest.raises(LayerKindError, match=r"computes with wrong weights.*block size \(64\)"):
            ll.attach(nn.ModuleList([layer]), "lora", r=2, targets="0")
    else:
        ll.attach(nn.ModuleList([layer]), "lora", r=2, targets="0")


def test_a_subclass_with_its_own_forward_is_not_taken() -> None:
    class Own(Linear4bit):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert not KIND.matches(Own(64, 32).to("cpu"))
    assert KIND.matches(bitsandbytes.nn.LinearNF4(64, 32).to("cpu"))


# --- CPUs with AVX512-bf16: a forward in eval mode without gradients packs a 4-bit layer


@torch.no_grad()
def evaluate(model: nn.Module) -> Tensor:
    """In eval mode without gradients; then back in training mode."""
    y: Tensor = model.eval()(inputs(3, 5))
    model.train()
    return y


def input_gradient(model: nn.Module) -> Tensor | None:
    x = inputs(3, 5).requires_grad_()
    model.train()(x).sum().backward()
    return x.grad


@avx512bf16
@pytest.mark.parametrize("name", FOUR_BIT)
def test_the_trap_is_there(base: Callable[..., nn.Module], name: str) -> None:
    """What follows tests something: an unattached model is packed by an evaluation.

    Its layers then give no gradients.
    """
    model, control = base(name), base(name)
    evaluate(model)
    layer = model.get_submodule("blocks.0.down")
    assert layer.weight.quant_state.packing_format_for_cpu  # type: ignore[union-attr]
    x = torch.randn(3, 128, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer(x).sum().backward()
    assert x.grad is None
    assert not same(state(model), state(control))
    with pytest.raises(AssertionError):
        quantised(nn.Linear(64, 48), name).eval()(inputs(3))


@avx512bf16
@pytest.mark.parametrize("name", FOUR_BIT)
def test_evaluation_does_not_pack_an_attached_layer(
    base: Callable[..., nn.Module], name: str
) -> None:
    """Evaluation computes what training mode computes, and gradients stay.

    The base is that of a control that was never evaluated. After detach it packs itself again,
    as an unattached layer does.
    """
    model, control = base(name), base(name)
    expected = input_gradient(control)
    one, two = attach(model, "lora", name="one"), attach(model, "pissa", name="two")
    assert torch.equal(evaluate(model), control(inputs(3, 5)))
    assert torch.equal(input_gradient(model), expected)  # type: ignore[arg-type]
    one.detach()
    evaluate(model)
    copied = copy.deepcopy(model)
    two.detach()
    ll.detach(copied)
    for left in (model, copied):
        assert_same_base(left, control)
    packed = evaluate(control)
    assert torch.equal(evaluate(model), packed)
    assert torch.equal(evaluate(copied), packed)
    assert_same_base(model, control)


@avx512bf16
@pytest.mark.parametrize("name", FOUR_BIT)
def test_layers_without_an_adapter_stay_plain(base: Callable[..., nn.Module], name: str) -> None:
    """Gradients of one layer's adapter go through other layers.

    So an evaluation must not pack these either.
    """
    model, control = base(name), base(name)
    expected = input_gradient(control)
    adapter = ll.attach(model, "lora", r=2, targets=r"0\.up$")
    evaluate(model)
    assert torch.equal(input_gradient(model), expected)  # type: ignore[arg-type]
    adapter.detach()
    model.zero_grad()
    control.zero_grad()
    assert_same_base(model, control)
    assert torch.equal(evaluate(model), evaluate(control))


@avx512bf16
@pytest.mark.parametrize("name", FOUR_BIT)
def test_calibration_does_not_pack(base: Callable[..., nn.Module], name: str) -> None:
    """It is a forward in eval mode without gradients; also one that fails leaves no trace."""
    model, control = base(name), base(name)
    with pytest.raises(ll.CalibrationError, match="batch 1"):
        ll.attach(
            model, "eva", r=4, targets=TARGETS, calibration=[inputs(4, 16), torch.zeros(3, 5)]
        )
    assert_same_base(model, control)
    attach(model, "eva").detach()
    assert_same_base(model, control)


@avx512bf16
@pytest.mark.parametrize("name", FOUR_BIT)
def test_shapes_that_cannot_be_packed(name: str) -> None:
    layer = quantised(nn.Linear(64, 48), name)
    model = nn.ModuleList([layer])
    y = layer.train()(inputs(3))
    ll.attach(model, "lora", r=2, targets="0")
    assert torch.equal(model.eval()[0](inputs(3)), y)


@avx512bf16
@pytest.mark.parametrize("name", FOUR_BIT)
def test_a_base_that_was_packed_before(base: Callable[..., nn.Module], name: str) -> None:
    """W is read from a packed layer too (its scales were rounded to bfloat16).

    Attached, it is unpacked and gives gradients; detached, it is packed as it was.
    """
    model, control, plain = base(name), base(name), base(name)
    evaluate(model), evaluate(control)
    layer, original = (
        model.get_submodule("blocks.0.down"),
        KIND.weight(plain.get_submodule("blocks.0.down")),
    )
    w = KIND.weight(layer)
    torch.testing.assert_close(w, original, rtol=2**-8, atol=0)
    assert KIND.dtype(layer) == torch.float32
    adapter = attach(model, "antipasto")
    assert torch.equal(KIND.weight(layer), w)
    gradient, expected = input_gradient(model), input_gradient(plain)
    assert gradient is not None
    assert expected is not None
    assert (gradient - expected).norm() < 0.02 * expected.norm()
    adapter.detach()
    assert_same_base(model, control)


# --- transformers


CONFIGS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}
TOKENS = torch.tensor([[5, 9, 3, 7, 1, 2], [8, 8, 4, 30, 6, 11]])


@pytest.fixture
def pretrained(tmp_path: Path) -> Callable[..., nn.Module]:
    """Saves a small model of a family once, and loads it quantised by transformers."""
    import transformers

    def make(family: str, bits: int) -> nn.Module:
        folder = tmp_path / family
        config, cls = (getattr(transformers, name) for name in CONFIGS[family])
        if not folder.exists():
            sizes = {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "vocab_size": 32,
                "head_dim": 32,
            }
            heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
            torch.manual_seed(0)
            cls(config(**sizes, **heads, initializer_range=0.1)).save_pretrained(folder)
        model: nn.Module = cls.from_pretrained(
            folder, quantization_config=how(bits), dtype=torch.float32
        )
        return model

    def how(bits: int) -> Any:
        if bits == 8:
            return transformers.BitsAndBytesConfig(load_in_8bit=True)
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )

    return make


def gradients(model: nn.Module, adapter: ll.Adapter) -> tuple[float, list[Tensor]]:
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    return float(loss.detach()), list(torch.autograd.grad(loss, list(adapter.parameters())))


@pytest.mark.parametrize("variant", ["lora", "antipasto", "ia3"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_quantised_by_transformers(
    pretrained: Callable[..., nn.Module], family: str, bits: int, variant: str, tmp_path: Path
) -> None:
    """Loaded with BitsAndBytesConfig, attached, trained with gradient checkpointing, saved.

    It loads onto a base that was quantised afresh, and onto one that was saved quantised.
    """
    model, control = pretrained(family, bits).train(), pretrained(family, bits).train()
    adapter = ll.attach(model, variant, **({"r": 8} if variant != "ia3" else {}))
    move(adapter, 0.02, seed=1)
    loss, expected = gradients(model, adapter)
    model.activation_checkpointing_enable()  # type: ignore[operator]
    again, found = gradients(model, adapter)
    assert again == loss
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    optimizer = torch.optim.Adam(adapter.param_groups(), lr=1e-2)
    for _ in range(6):
        optimizer.zero_grad()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    assert gradients(model, adapter)[0] < loss
    adapter.save(file := tmp_path / "adapter.safetensors")
    trained = model(input_ids=TOKENS).logits
    adapter.detach()
    model.save_pretrained(tmp_path / "quantised")  # type: ignore[operator]
    saved = type(model).from_pretrained(tmp_path / "quantised").train()  # type: ignore[attr-defined]
    assert torch.equal(model(input_ids=TOKENS).logits, control(input_ids=TOKENS).logits)
    for fresh in (control, saved):
        ll.load(fresh, file)
        assert torch.equal(fresh(input_ids=TOKENS).logits, trained)


@pytest.mark.filterwarnings("ignore:lora-lite. the model is saved with its adapter")  # as it is
@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_trainer(
    pretrained: Callable[..., nn.Module], bits: int, tmp_path: Path
) -> None:
    """The Trainer refuses a quantised model whose adapters are not PEFT's.

    Built inside `trainer_accepts` it trains, with gradient checkpointing and evaluations, and
    afterwards the model can be saved as any other.
    """
    from transformers import Trainer, TrainingArguments

    model, control = pretrained("llama", bits), pretrained("llama", bits)
    data = [{"input_ids": row, "labels": row} for row in TOKENS]
    arguments = TrainingArguments(
        tmp_path / "run",
        num_train_epochs=6,
        learning_rate=1e-2,
        activation_checkpointing=True,
        eval_strategy="epoch",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    with pytest.raises(ll.AdapterError, match="no adapter to train"), trainer_accepts(model):
        pass
    adapter = ll.attach(model, "lora", r=4)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    with trainer_accepts(model):
        trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    assert "_hf_peft_config_loaded" not in vars(model)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    adapter.save(file := tmp_path / "adapter.safetensors")
    trained = model.train()(input_ids=TOKENS).logits
    adapter.detach()
    model.save_pretrained(tmp_path / "after")  # type: ignore[operator]
    saved = type(model).from_pretrained(tmp_path / "after").train()  # type: ignore[attr-defined]
    assert torch.equal(saved(input_ids=TOKENS).logits, control.train()(input_ids=TOKENS).logits)
    ll.load(control, file)
    assert torch.equal(control(input_ids=TOKENS).logits, trained)


# --- libraries without a layer kind


def by_torch_ao(model: nn.Module) -> None:
    from torch.ao.nn.quantized import dynamic

    layer = model.get_submodule("blocks.0")
    layer.qconfig = torch.ao.quantization.default_dynamic_qconfig  # type: ignore[assignment]
    model.blocks[0] = dynamic.Linear.from_float(layer)  # type: ignore[union-attr,index]


def by_hqq(model: nn.Module) -> None:
    hqq = pytest.importorskip("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
    model.blocks[0] = hqq.HQQLinear(
        model.blocks[0], config, compute_dtype=torch.float32, device="cpu"
    )  # type: ignore[union-attr,index]


def by_quanto(model: nn.Module) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint4)
    quanto.freeze(model)


def by_torchao(model: nn.Module) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
@pytest.mark.parametrize(
    ("quantise", "says"),
    [
        (by_torch_ao, ("torch.ao.nn.quantized.dynamic", "Linear")),
        (by_hqq, ("hqq.core", "HQQLinear")),
        (by_quanto, ("optimum.quanto", "QLinear")),
        (by_torchao, ("torch.nn", "Linear", "torchao", "Int8Tensor")),
    ],
)
def test_a_layer_that_nobody_teaches(
    quantise: Callable[[nn.Module], None],
    says: tuple[str, ...],
    refused: Callable[..., AbstractContextManager[Any]],
) -> None:
    """The error says what kind of layer it is and how a kind is taught.

    Nothing is read from packed weights.
    """
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(64, 64)])})
    quantise(model)
    for variant in ("lora", "pissa"):
        layers = ("blocks.0",)
        with refused(None, LayerKindError, (*says, "lora_lite.layers"), layers=layers):
            ll.attach(model, variant, r=4)
    assert "lora_default_A" not in dict(model.named_parameters())
