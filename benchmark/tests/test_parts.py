"""The rows that train the norms or the output head, and nothing beside them."""

import copy
from collections.abc import Callable
from pathlib import Path

import lora_lite as ll
import pytest
import torch
from lora_lite.errors import LoraLiteError
from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.models import load_model
from lora_lite_benchmark.parts import PARTS
from lora_lite_benchmark.run import run_one
from lora_lite_benchmark.variants import attach_adapter
from torch import nn

Make = Callable[..., RunConfig]

NORMS = [
    *(f"model.layers.{i}.{name}_layernorm" for i in (0, 1) for name in ("input", "post_attention")),
    "model.norm",
]


@pytest.mark.parametrize(("row", "layers"), [("norms", NORMS), ("head", ["lm_head"])])
def test_a_part_is_trained_and_the_rest_stays(
    make_config: Make, row: str, layers: list[str], tmp_path: Path
) -> None:
    """Its layers are those of its name, it learns, its file gives the trained model's bits on a
    fresh base, and the base under it keeps its own.
    """
    config = make_config(row, lr=0.03)
    model = load_model(config)
    before = copy.deepcopy(model.state_dict())
    adapter = attach_adapter(model, config, [])
    assert isinstance(adapter, ll.Adapter)
    assert sorted(adapter.sites) == sorted(layers)
    sizes = [model.get_submodule(path).weight.numel() for path in layers]  # type: ignore[operator,union-attr]
    assert adapter.num_parameters == sum(sizes)
    adapter.detach()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    result = run_one(config, tmp_path)
    assert result.reloaded_identical
    assert result.curve[-1].loss < result.curve[0].loss
    assert result.versions["lora-lite-full"]


def test_a_tied_head_leaves_the_embedding(make_config: Make) -> None:
    """A head that shares its weight with the embedding is trained by itself."""
    model = load_model(make_config("base"))
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    embedding = model.model.embed_tokens.weight.detach().clone()
    adapter = attach_adapter(model, make_config("head"), [])
    with torch.no_grad():
        for _, parameter in adapter.named_parameters():
            parameter.add_(1.0)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model.model.embed_tokens(ids), embedding[ids])
    changed = model(ids).logits
    with adapter.disabled():
        assert not torch.allclose(model(ids).logits, changed)


def test_parts_take_the_fields_of_full_alone(make_config: Make) -> None:
    """Fields that would be ignored in silence are refused, as those of any variant are."""
    assert make_config("norms").fields == {"only": None}
    assert make_config("norms:only=bias").fields["only"] == "bias"
    with pytest.raises(LoraLiteError):
        make_config("norms:r=4")


def test_a_model_without_the_part_says_so(make_config: Make) -> None:
    with pytest.raises(BenchmarkError, match="'norms' was asked for, and Sequential has no norms"):
        attach_adapter(nn.Sequential(nn.Linear(2, 2)), make_config("norms"), [])


def test_no_variant_has_the_name_of_a_part() -> None:
    """Otherwise that variant could not be asked for."""
    assert not PARTS.keys() & ll.variants().keys()
