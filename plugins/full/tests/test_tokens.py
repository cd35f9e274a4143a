"""What is special to `tokens`: chosen rows of an embedding and its head, old tokens and new."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

Make = Callable[..., nn.Module]

BOTH = r"(embed_tokens|lm_head)$"


def trained(adapter: ll.Adapter) -> dict[str, Tensor]:
    """Give every parameter other values; what they are then, by name."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng).to(parameter))
    return {key: parameter.detach().clone() for key, parameter in adapter.named_parameters()}


def resized(make: Make, seed: int) -> nn.Module:
    """A Llama with a tied head and 32 tokens, and two more whose rows `seed` draws."""
    model: Any = make(tie_word_embeddings=True).eval()
    torch.manual_seed(seed)
    model.resize_token_embeddings(34, mean_resizing=False)
    nn.init.normal_(model.model.embed_tokens.weight[32:].data)
    resized: nn.Module = model
    return resized


def test_only_the_chosen_rows_change() -> None:
    """Embedding and linear head, in float64: the outputs of a layer with these rows replaced."""
    ids = torch.tensor([[0, 3, 3, 5], [1, 2, 4, 6]])
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    for layer, given in ((nn.Embedding(7, 6), ids), (nn.Linear(6, 7, bias=False), x)):
        model = nn.Sequential(layer).double()
        before = model(given)
        adapter = ll.attach(model, "tokens", ids=[5, 3, 3], targets="0", dtype=torch.float64)
        assert str(adapter.variant) == "tokens(ids=(3, 5))"
        assert torch.equal(model(given), before)
        rows = trained(adapter)["0.rows"]
        after = model(given)
        adapter.detach()
        with torch.no_grad():
            layer.weight[[3, 5]] = rows
        torch.testing.assert_close(after, model(given), rtol=1e-12, atol=1e-12)


def test_rows_of_tokens_that_are_not_there_learn_nothing() -> None:
    """A row has a gradient if its token was read, and no other."""
    model = nn.Sequential(nn.Embedding(7, 6))
    adapter = ll.attach(model, "tokens", ids=[1, 2, 6], targets="0")
    model(torch.tensor([0, 2, 5])).sum().backward()
    (rows,) = adapter.parameters()
    assert rows.grad is not None
    assert rows.grad.any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("ids", [[40], [-1], ["a"], 3, [True]])
def test_bad_ids_are_named(ids: Any, tiny_llama: Make) -> None:
    """An id beyond the vocabulary, or what is no id."""
    with pytest.raises(ll.LoraLiteError, match="ids"):
        ll.attach(tiny_llama(), "tokens", ids=ids, targets="embed_tokens")


def test_a_norm_is_neither_embedding_nor_head(tiny_llama: Make) -> None:
    """The misfit names the layer."""
    with pytest.raises(ll.MisfitError, match=r"model\.norm.*neither an embedding nor a head"):
        ll.attach(tiny_llama(), "tokens", ids=[1], targets=r"model\.norm$")


def test_new_tokens_of_a_resized_vocabulary_with_a_tied_head(
    tiny_llama: Make, tmp_path: Path
) -> None:
    """LoRA and the rows of two new tokens: a file gives them back wherever their rows were drawn.

    Embedding and head have rows of their own, so the tie of the base stays as it is.
    """
    model = resized(tiny_llama, seed=1)
    ids = torch.tensor([[5, 32, 7, 33], [1, 2, 33, 3]])
    before = model(input_ids=ids).logits
    recipe = {"q_proj$": ("lora", {"r": 2}), BOTH: ("tokens", {"ids": [32, 33]})}
    adapter = ll.attach(model, recipe, exclude=())
    assert torch.equal(model(input_ids=ids).logits, before)
    model(input_ids=ids, labels=ids).loss.backward()
    for parameter in adapter.parameters():
        assert parameter.grad is not None
    trained(adapter)
    expected = model(input_ids=ids).logits
    adapter.save(tmp_path / "adapter")

    other = resized(tiny_llama, seed=2)
    assert float((other(input_ids=ids).logits - expected).detach().abs().max()) > 1e-2
    ll.load(other, tmp_path / "adapter")
    torch.testing.assert_close(other(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    embedding: Any = other.get_input_embeddings()  # type: ignore[operator]
    assert other.get_output_embeddings().weight is embedding.weight  # type: ignore[operator]


@pytest.mark.parametrize("ids", [[3, 7], []])
def test_tokens_are_merged(tiny_llama: Make, tmp_path: Path, ids: list[int]) -> None:
    """Promise: a merged checkpoint has the new rows, in the embedding and in the head."""
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    adapter = ll.attach(model, "tokens", ids=ids, targets="embed_tokens|lm_head", exclude=())
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    adapter.save(tmp_path / "out", format="merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.tensor([[3, 7, 5, 1]])
    torch.testing.assert_close(plain(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
