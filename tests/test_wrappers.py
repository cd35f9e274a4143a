"""What people do to a model with adapters: copy, pickle, compile, checkpoint, autocast, train with
Trainer, generate.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import safetensors
import torch
from lora_lite.author import Variant
from lora_lite_antipasto import AntiPaSTO
from lora_lite_lora import LoRA
from torch import Tensor, nn

Make = Callable[..., nn.Module]
Refused = Callable[..., AbstractContextManager[Any]]
TOKENS = torch.tensor([[5, 9, 3, 7, 1, 2], [8, 8, 4, 30, 6, 11]])
VARIANTS = [LoRA(r=3), AntiPaSTO(r=8)]


def randomize(adapter: ll.Adapter, seed: int = 1) -> None:
    """Give every trainable tensor random values."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) / 4)


def keys(path: Path) -> set[str]:
    """The names of the tensors in a file."""
    with safetensors.safe_open(path, framework="pt") as file:
        return set(file.keys())


def tokens(model: nn.Module) -> Tensor:
    """Logits of the fixed tokens."""
    out: Tensor = model(input_ids=TOKENS).logits
    return out


def checkpoint(model: nn.Module, reentrant: bool) -> None:
    """Turn gradient checkpointing on, by transformers' newer name for it or the older one."""
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": reentrant})


# --- copies


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies_are_whole_and_independent(tiny_llama: Make, variant: Variant, how: str) -> None:
    """A copy computes the same, and adapters() finds its adapter.

    Training, scaling or detaching it leaves the original alone.
    """
    model = tiny_llama().eval()
    base = tokens(model)
    adapter = ll.attach(model, variant)
    randomize(adapter)
    expected = tokens(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        torch.save(model, buffer := io.BytesIO())
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(tokens(twin), expected)
    (other,) = ll.adapters(twin).values()
    assert other.sites == adapter.sites
    assert {id(p) for p in other.parameters()} <= {id(p) for p in twin.parameters()}
    other.scale = 0
    assert torch.equal(tokens(twin), base)
    assert torch.equal(tokens(model), expected)
    other.detach()
    assert torch.equal(tokens(twin), base)
    assert not ll.adapters(twin)
    assert torch.equal(tokens(model), expected)
    adapter.detach()
    assert torch.equal(tokens(model), base)
    assert twin.state_dict().keys() == model.state_dict().keys()


def test_adapters_of_parts_and_wrappers(tiny_llama: Make, refused: Refused) -> None:
    """adapters() sees through wrappers, and says where to look when asked on a part."""
    model = tiny_llama()
    assert ll.adapters(model) == {}
    adapter = ll.attach(model, "lora", r=2)
    for seen in (
        model,
        torch.compile(model, backend="eager"),
        nn.Sequential(model),
        nn.ModuleDict({"policy": model, "value": nn.Linear(2, 2)}),
    ):
        (found,) = ll.adapters(seen).values()
        assert [id(p) for p in found.parameters()] == [id(p) for p in adapter.parameters()]
    with refused(model, ll.AdapterError, ("LlamaModel", "larger model")):
        ll.adapters(model.model)
    with refused(model, ll.AdapterError, ("LlamaModel", "larger model")):
        ll.attach(model.model, "lora", r=2, name="second")
    with refused(model, ll.AdapterError, ("LlamaForCausalLM", "part")):
        ll.attach(nn.Sequential(model), "lora", r=2, name="second")
    assert ll.adapters(nn.Linear(2, 2)) == {}


def test_two_roots_are_noticed(blocks: Make, refused: Refused) -> None:
    """Attached through two parts, the whole says so; each part still detaches its own."""
    model = blocks()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    one = ll.attach(model.blocks[0], "lora", r=2, targets=".")
    two = ll.attach(model.blocks[1], "lora", r=2, targets=".")
    for function in (ll.adapters, lambda m: ll.attach(m, "lora", r=2)):
        with refused(model, ll.AdapterError, ("2 modules", "Block")):
            function(model)
    one.detach()
    assert list(ll.adapters(model)) == ["default"]
    two.detach()
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())


# --- torch.compile


@pytest.mark.parametrize("compiled", ["when attaching", "when loading", "both"])
def test_compile_wrapper_leaves_no_trace_in_files(
    tiny_llama: Make, tmp_path: Path, compiled: str
) -> None:
    """Attach, save and load through torch.compile's wrapper: the file is the same as without it."""

    def wrap(model: nn.Module, when: str) -> Any:
        return torch.compile(model, backend="eager") if compiled in (when, "both") else model

    model = tiny_llama().eval()
    adapter = ll.attach(wrap(model, "when attaching"), "lora", r=2)
    randomize(adapter)
    ll.save(wrap(model, "when attaching"), tmp_path / "a")
    assert not any("_orig_mod" in key for key in keys(tmp_path / "a"))
    fresh = tiny_llama().eval()
    ll.load(wrap(fresh, "when loading"), tmp_path / "a")
    assert torch.equal(tokens(fresh), tokens(model))


def test_compiled_and_checkpoint_wrapped_parts(blocks: Make, tmp_path: Path) -> None:
    """A compiled block, a compiled layer, a block in a checkpoint wrapper: the same paths."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain, wrapped = blocks(3), blocks(3)
    wrapped.blocks[0] = torch.compile(wrapped.blocks[0], backend="eager")
    wrapped.blocks[1].up = torch.compile(wrapped.blocks[1].up, backend="eager")
    wrapped.blocks[2] = checkpoint_wrapper(wrapped.blocks[2])
    adapter = ll.attach(wrapped, "lora", r=2)
    assert adapter.sites.keys() == {
        f"blocks.{i}.{name}" for i in range(3) for name in ("up", "down")
    }
    randomize(adapter)
    adapter.save(tmp_path / "a")
    ll.load(plain, tmp_path / "a")
    x = torch.randn(4, 8)
    torch.testing.assert_close(wrapped(x), plain(x))


def _compile_block(model: nn.Module) -> None:
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")  # type: ignore[index, operator]


def _compile_block_in_place(model: nn.Module) -> None:
    model.blocks[0].compile(backend="eager")  # type: ignore[index, operator]


def _compile_forward(model: nn.Module) -> None:
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "compile_part", [_compile_block, _compile_block_in_place, _compile_forward]
)
def test_compiled_layers_are_not_called_uncalled(
    blocks: Make, tmp_path: Path, compile_part: Callable[[nn.Module], None]
) -> None:
    """Hooks leave no trace in compiled code, so nobody is told that its layers are never called."""
    model = blocks()
    adapter = ll.attach(model, "lora", r=2)
    randomize(adapter)
    compile_part(model)
    model.train()(torch.randn(4, 8)).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    adapter.save(tmp_path / "a")


def test_wrapping_after_attaching(blocks: Make, tmp_path: Path) -> None:
    """Blocks that are compiled or checkpoint-wrapped once the adapter is there.

    Saving, scaling and detaching still work.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = blocks()
    x = torch.randn(4, 8)
    base = model(x)
    randomize(ll.attach(model, "lora", r=2))
    adapted = model(x)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    torch.testing.assert_close(model(x), adapted)
    ll.save(model, tmp_path / "a")
    ll.load(fresh := blocks(), tmp_path / "a")
    torch.testing.assert_close(fresh(x), adapted)
    ll.detach(model)
    torch.testing.assert_close(model(x), base)
    assert all(p.requires_grad for p in model.parameters())


# --- checkpointing, autocast, generation, Trainer


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradient_checkpointing_gives_the_same_gradients(
    tiny_llama: Make, variant: Variant
) -> None:
    """Not reentrant, and reentrant with input gradients: the gradients of the plain run."""
    gradients = []
    for kind in (None, False, True):
        model = tiny_llama().train()
        adapter = ll.attach(model, variant)
        randomize(adapter)
        if kind is not None:
            checkpoint(model, kind)
        if kind:
            model.enable_input_require_grads()
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients.append([p.grad for p in adapter.parameters()])
        assert ll.check(model, {"input_ids": TOKENS, "labels": TOKENS}).parameters == len(
            gradients[0]
        )
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


@pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad"
)  # torch says it too, and goes on
def test_check_explains_reentrant_checkpointing(tiny_llama: Make, refused: Refused) -> None:
    """Reentrant checkpointing without input gradients silently trains nothing.

    check() says so, and what to do.
    """
    model = tiny_llama().train()
    ll.attach(model, "lora", r=2)
    checkpoint(model, reentrant=True)
    model.disable_input_require_grads()  # newer versions of transformers turn them on
    ways_out = ("use_reentrant", "enable_input_require_grads")
    with refused(None, ll.CheckError, ("does not depend on any", *ways_out)):
        ll.check(model, {"input_ids": TOKENS, "labels": TOKENS})
    ll.attach(model, "lora", r=2, name="head", targets="lm_head", exclude=())
    with refused(None, ll.CheckError, (*ways_out, "A: no gradient")):
        ll.check(model, {"input_ids": TOKENS, "labels": TOKENS})


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_autocast(tiny_llama: Make, variant: Variant) -> None:
    """Under autocast a float32 model gives logits as close as bfloat16 is.

    Gradients are in float32, and parameters stay there.
    """
    model = tiny_llama().eval()
    adapter = ll.attach(model, variant)
    randomize(adapter)
    exact = tokens(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(input_ids=TOKENS, labels=TOKENS)
    output.loss.backward()
    torch.testing.assert_close(output.logits.float(), exact, rtol=0.05, atol=0.05)
    assert all(
        p.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in adapter.parameters()
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_generate_under_frozen(tiny_llama: Make, variant: Variant) -> None:
    """frozen() changes no generated token and no logit, and computes `prepare` once a site."""
    model = tiny_llama().eval()
    adapter = ll.attach(model, variant)
    randomize(adapter)
    arguments = {"attention_mask": torch.ones_like(TOKENS), "max_new_tokens": 8, "do_sample": False}
    plain = model.generate(TOKENS, **arguments)
    expected = tokens(model)
    calls = []
    original = type(variant).prepare
    if isinstance(variant, AntiPaSTO):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                AntiPaSTO, "prepare", lambda *args, **kw: calls.append(1) or original(*args, **kw)
            )
            with adapter.frozen():
                assert torch.equal(model.generate(TOKENS, **arguments), plain)
        assert len(calls) == len(adapter.sites)
    with adapter.frozen(), torch.no_grad():
        assert torch.equal(tokens(model), expected)
    with pytest.raises(ll.AdapterError, match="frozen") as caught, adapter.frozen():
        randomize(adapter, seed=2)
    assert caught.value.adapter == "default"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_trainer(tiny_llama: Make, tmp_path: Path, variant: Variant) -> None:
    """transformers' Trainer trains the adapter and nothing else, and its loss falls."""
    from transformers import Trainer, TrainingArguments

    model = tiny_llama()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapter = ll.attach(model, variant)
    before = adapter.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    loss = float(model(input_ids=TOKENS, labels=TOKENS).loss.detach())
    arguments = TrainingArguments(
        tmp_path,
        max_steps=20,
        learning_rate=5e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    Trainer(model, arguments, train_dataset=rows).train()
    assert float(model(input_ids=TOKENS, labels=TOKENS).loss.detach()) < loss - 0.1
    named = dict(model.named_parameters())
    assert all(torch.equal(named[name], value) for name, value in base.items())
    trained = {name for name, _ in adapter.named_parameters()}
    assert {
        name for name, value in adapter.state_dict().items() if not torch.equal(value, before[name])
    } == trained
    adapter.save(tmp_path / "a")
    ll.load(fresh := tiny_llama().eval(), tmp_path / "a")
    assert torch.equal(tokens(fresh), tokens(model.eval()))


# --- check


class Odd(nn.Module):
    """Has a layer that is never called, a buffer that every forward changes, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.norm = nn.BatchNorm1d(6)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {
            "mask": torch.ones(2, dtype=torch.bool),
            "y": self.norm(self.dropout(self.layers[0](x))),
        }


def test_check_restores_everything() -> None:
    """Parameters, buffers, gradients, hooks, modes and the random state are bitwise what they were.

    Also after a failure.
    """
    model = Odd().train()
    x, misfit = torch.randn(5, 6), torch.randn(5, 7)
    adapter = ll.attach(model, "lora", r=2, targets=r"layers\.0")
    model(x)["y"].sum().backward()
    gradients = {
        name: None if p.grad is None else (p.grad, p.grad.clone())
        for name, p in model.named_parameters()
    }
    assert any(g is not None for g in gradients.values())
    random = torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = ll.check(model, x)
    assert (report.adapters, report.sites, report.parameters) == (("default",), 1, 2)
    assert (
        str(report) == "default: 1 layers were called, 2 parameters got a finite, non-zero gradient"
    )
    with pytest.raises(RuntimeError):
        ll.check(model, misfit)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(torch.get_rng_state(), random)
    for name, p in model.named_parameters():
        kept = gradients[name]
        assert (
            p.grad is None if kept is None else (p.grad is kept[0] and torch.equal(p.grad, kept[1]))
        )
    assert len(model.layers[0]._forward_hooks) == 1
    adapter.detach()


def test_check_finds_what_is_wrong(refused: Refused) -> None:
    """No adapter, a layer that is never called, an adapter that is off, frozen parameters, no
    gradients: each in words.
    """
    with refused(None, ll.AdapterError, ("no adapter",)):
        ll.check(Odd(), torch.randn(5, 6))
    model = Odd()
    adapter = ll.attach(model, "lora", r=2)
    x = torch.randn(5, 6)
    says = ("layers.1: the layer was never called", "default: layers.1.A: no gradient", "exclude=")
    with refused(None, ll.CheckError, says, layer="layers.1"):
        ll.check(model, x)
    adapter.detach()
    adapter = ll.attach(model, "lora", r=2, layers=0)
    ll.check(model, x)
    with adapter.disabled(), refused(None, ll.CheckError, ("'default' is disabled",)):
        ll.check(model, x)
    adapter.scale = 0
    with refused(None, ll.CheckError, ("'default'", "scale 0", "the gradient is zero")):
        ll.check(model, x)
    adapter.scale = 1
    with torch.no_grad(), refused(None, ll.CheckError, ("gradients are off",)):
        ll.check(model, x)
    with refused(None, ll.CheckError, ("the gradient is not finite",)):
        ll.check(model.eval(), torch.full((5, 6), 1e38))
    model.requires_grad_(False)
    with refused(None, ll.CheckError, ("requires a gradient", "requires_grad_(False)")):
        ll.check(model, x)


def test_check_takes_what_a_model_takes(tiny_llama: Make) -> None:
    """A batch is keywords with labels, keywords without, positions, or one tensor.

    A compiled or wrapped model will do.
    """
    model = tiny_llama()
    ll.attach(model, "lora", r=2)
    for batch in (
        {"input_ids": TOKENS, "labels": TOKENS},
        {"input_ids": TOKENS},
        (TOKENS,),
        TOKENS,
    ):
        assert ll.check(model, batch).sites == 14
    assert ll.check(torch.compile(model, backend="eager"), TOKENS).sites == 14
