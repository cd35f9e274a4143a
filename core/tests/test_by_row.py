"""A batch whose rows use different adapters."""

import copy
from collections.abc import Callable
from typing import Any

import lora_lite as ll
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

Make = Callable[..., nn.Module]

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2},
    "pissa": {"r": 2},
    "dora": {"r": 2},
    "delora": {"r": 2},
    "hra": {"r": 2},
    "ia3_ff": {},
    "lora_xs": {"r": 2},
    "road": {"group_size": 2},
    "antipasto": {"r": 4},
    "antipasto_mix": {"r": 4, "k": 2},
    "full": {},
}


def moved(adapter: ll.Adapter, seed: int) -> ll.Adapter:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    adapter.project()
    return adapter


def one_by_one(model: nn.Module, x: Any, names: list[str | None]) -> Tensor:
    """Every row with its own adapter alone."""
    found = ll.adapters(model)
    rows = []
    for row, name in enumerate(names):
        for other, adapter in found.items():
            adapter.enabled = other == name
        rows.append(model(x[row : row + 1]))
    for adapter in found.values():
        adapter.enabled = True
    return torch.cat(rows)


NAMES: list[str | None] = ["a", None, "b", "a", "b"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_come_out_as_with_their_own_adapter(blocks: Make, variant: str) -> None:
    """Promise: a batch by rows is its rows one by one, with gradients, for every variant; after it
    the model is as before."""
    model = blocks().double()
    for seed, name in enumerate(("a", "b", "c")):
        options = {"dtype": torch.float64, "targets": r"\.(up|down)$", **VARIANTS[variant]}
        moved(ll.attach(model, variant, name=name, **options), seed)
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    before = model(x)
    expected = one_by_one(model, x, NAMES)
    model.zero_grad()
    expected.square().mean().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with ll.adapters_by_row(model, NAMES):
        found = model(x)
        torch.testing.assert_close(found, expected)
        found.square().mean().backward()
        inside = model(x, attention_mask=None)
        assert torch.equal(copy.deepcopy(model)(x), before)  # a copy is in no context
    torch.testing.assert_close(inside, expected)
    for name, parameter in model.named_parameters():
        if name in gradients and "_c_" not in name:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-3)
    assert torch.equal(model(x), before)


def test_every_kind_of_layer() -> None:
    """Promise: embeddings, convolutions and whole modules too."""
    net = nn.Sequential(
        nn.Embedding(9, 6), nn.Conv1d(4, 5, 3, padding=1), nn.LayerNorm(6), nn.Linear(6, 3)
    )
    recipe = {"0|1|3": ("lora", {"r": 2}), "2": "full"}
    for seed, name in enumerate(("a", "b")):
        moved(ll.attach(net, recipe, name=name), seed)
    ids = torch.randint(9, (5, 4))
    expected = one_by_one(net, ids, NAMES)
    with ll.adapters_by_row(net, NAMES):
        torch.testing.assert_close(net(ids), expected)


def test_generation_and_compile() -> None:
    """Promise: `generate` decodes every row with its own adapter; a compiled model follows."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for seed, name in enumerate(("a", "b")):
        moved(ll.attach(model, "lora", r=2, name=name), seed)
    prompt = torch.randint(1, 32, (5, 3))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with ll.adapters_by_row(model, NAMES):
        found = model.generate(prompt, **options)
        logits = model(prompt).logits
    for row, name in enumerate(NAMES):
        with ll.adapters_by_row(model, [name]):
            alone = model.generate(prompt[row : row + 1], **options)
        assert torch.equal(found[row], alone[0])
    compiled = torch.compile(model, backend="eager")
    compiled(prompt)
    with ll.adapters_by_row(model, NAMES):
        torch.testing.assert_close(compiled(prompt).logits, logits)


def test_another_adapters_tensors_need_no_other_graph(blocks: Make) -> None:
    """Promise: a compiled model serves one adapter after the other, if they are copied into one."""
    model, counter = blocks(), CompileCounter()
    states = []
    for seed in range(3):
        adapter = moved(ll.attach(model, "lora", r=2), seed)
        states.append((adapter.state_dict(), model(torch.ones(1, 8))))
        adapter.detach()
    served = ll.attach(model, "lora", r=2)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for state, expected in states:
        served.load_state_dict(state)
        assert torch.equal(compiled(torch.ones(1, 8)), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a", "x"], "no adapter named 'x'"),
        ([3], "no adapter named 3"),
        ("a", "names='a'"),
        ([], r"names=\[\]"),
        (["a", "off"], "'off' is switched off"),
    ],
)
def test_bad_names_are_refused(blocks: Make, names: Any, told: str) -> None:
    model = blocks()
    ll.attach(model, "lora", r=2, name="a")
    ll.attach(model, "lora", r=2, name="off").enabled = False
    with pytest.raises(ll.AdapterError, match=told), ll.adapters_by_row(model, names):
        pass
    with ll.adapters_by_row(model, ["a"]), pytest.raises(ll.AdapterError, match="already"):
        ll.adapters_by_row(model, ["a"]).__enter__()
    assert ll.adapters(model)["a"]._state.selection is None


def test_what_has_no_rows_of_the_batch_is_refused(blocks: Make) -> None:
    """Promise: rows that are not the batch's are an error that names the layer, and never get
    another row's adapter: another number, a router's choice, several arguments."""
    model = blocks()
    ll.attach(model, "lora", r=2, name="a")
    with ll.adapters_by_row(model, ["a", None]):
        with pytest.raises(ll.AdapterError, match=r"blocks\.0\.up gets \[6, 8\]"):
            model(torch.randn(6, 8))
        model(torch.randn(2, 8))
    mixture = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])})
    ll.attach(mixture, "lora", r=2, name="a")
    with (
        ll.adapters_by_row(mixture, ["a", None]),
        pytest.raises(ll.AdapterError, match=r"experts\.0 gets rows that a router"),
    ):
        mixture["experts"][0](torch.randn(2, 4))
