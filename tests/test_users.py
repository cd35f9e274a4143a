"""Models of other libraries, small and random: a UNet of diffusers, a vision transformer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from torch import Tensor, nn


def lives_through(
    model: nn.Module, call: Callable[[], Tensor], recipe: dict[str, Any], folder: Path
) -> ll.Adapter:
    """Attach, train a step, save, detach, load: as a user would, with nothing lost on the way."""
    before = call()
    adapter = ll.attach(model, recipe)
    assert torch.equal(call(), before)
    optimizer = torch.optim.AdamW(adapter.param_groups(), lr=1e-2)
    model.train()
    for _ in range(2):
        call().square().mean().backward()
        optimizer.step()
    model.eval()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    after = call()
    assert not torch.equal(after, before)
    adapter.save(folder / "adapter")
    adapter.detach()
    assert torch.equal(call(), before)
    adapter = ll.load(model, folder / "adapter")
    assert torch.equal(call(), after)
    return adapter


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_unet_of_diffusers(tmp_path: Path) -> None:
    """Promise: attention, convolutions and norms of a diffusion model, in one recipe."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    x, text, steps = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8), torch.tensor([1, 2])
    recipe = {
        r"to_(q|k|v|out\.0)$": ("lora", {"r": 2}),
        r"conv(1|2|_in)$": ("lora", {"r": 2}),
        r"norm\d?$": "full",
    }
    lives_through(model, lambda: model(x, steps, text).sample, recipe, tmp_path)


def test_a_vision_transformer(tmp_path: Path) -> None:
    """Promise: patches that a convolution makes, blocks, and a new head, in one recipe; and the
    default finds the blocks."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            num_labels=3,
        )
    ).eval()
    images = torch.randn(2, 3, 8, 8)
    recipe = {
        "projection$": ("lora", {"r": 2}),
        r"(query|value|q_proj|v_proj)$": ("antipasto", {"r": 8}),
        "classifier$": "full",
    }
    lives_through(model, lambda: model(images).logits, recipe, tmp_path).detach()
    with pytest.warns(ll.AdapterWarning, match="classifier"):
        found = ll.attach(model, "lora", r=2)
    assert all("layer" in path for path in found.sites)
