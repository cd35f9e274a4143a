"""Masks: padding is left out of calibration whatever form its mask has; one that cannot be matched
is an error.

Held with EVA, whose tensors are the principal directions of what it saw: padding that counts turns
them.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from typing import Any

import lora_lite as ll
import numpy as np
import pytest
import torch
from lora_lite.author import Observer, Rng, Site, Tensors, TensorSpec, Variant
from torch import Tensor, nn

B, T, D = 2, 9, 8


class Net(nn.Module):
    """One layer, and a forward that takes masks and does nothing with them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(D, D)])

    def forward(self, x: Tensor, attention_mask: Any = None, labels: Any = None) -> Tensor:
        out: Tensor = self.layers[0](x)
        return out


# Row 0 has five real tokens, row 1 seven; padding is large and all of one direction.
REAL = torch.arange(T) < torch.tensor([[5], [7]])


def inputs(real: Tensor = REAL) -> Tensor:
    """Activations with padding that would be the first principal direction by far."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(B, T, D, generator=rng)
    padding = 50 * torch.randn(1, D, generator=rng) * torch.randn(B, T, 1, generator=rng)
    return torch.where(real[..., None], x, padding)


def directions(batch: Any) -> Tensor:
    """The first principal direction that EVA finds."""
    adapter = ll.attach(Net(), "eva", r=1, center=False, calibration=[batch])
    return adapter.state_dict()["layers.0.A"].flatten()


def right_direction(real: Tensor = REAL) -> Tensor:
    """The same by hand: the first right singular vector of the real tokens' rows."""
    found: Tensor = torch.linalg.svd(inputs(real)[real].double()).Vh[0]
    return found.float()


def assert_right(batch: Any, real: Tensor = REAL) -> None:
    """Up to the sign, which is EVA's to choose."""
    found, expected = directions(batch), right_direction(real)
    cosine = abs(float(found @ expected / found.norm() / expected.norm()))
    assert cosine > 1 - 1e-5, f"cosine to the right direction {cosine:.3f}"


LEAST = torch.finfo(torch.float32).min
CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()
ALLOWED = CAUSAL & REAL[:, None]  # (B, T, T): who may look at whom


def additive(allowed: Tensor, least: float = float("-inf"), dtype: Any = torch.float32) -> Tensor:
    """0 where allowed, else a number that softmax makes 0 of."""
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, least)


FORMS: dict[str, Any] = {
    "int64": REAL.long(),
    "int32": REAL.int(),
    "uint8": REAL.byte(),
    "bool": REAL,
    "float32": REAL.float(),
    "bfloat16": REAL.bfloat16(),
    "float64": REAL.double(),
    "numpy int64": REAL.long().numpy(),
    "numpy bool": REAL.numpy(),
    "numpy float32": REAL.float().numpy(),
    "list": REAL.long().tolist(),
    "list of bools": REAL.tolist(),
    "tuple of tuples": tuple(map(tuple, REAL.long().tolist())),
    "additive": additive(REAL),
    "additive, least float": additive(REAL, LEAST),
    "additive, -10000": additive(REAL, -10_000.0),
    "additive, bfloat16": additive(REAL, torch.finfo(torch.bfloat16).min, torch.bfloat16),
    "(B, 1, 1, T) int": REAL[:, None, None].long(),
    "(B, 1, 1, T) bool": REAL[:, None, None],
    "(B, 1, 1, T) additive": additive(REAL[:, None, None]),
    "(B, 1, T, T) of columns": REAL[:, None, None].expand(B, 1, T, T).float(),
    "(B, 1, T, T) causal bool": ALLOWED[:, None],
    "(B, 1, T, T) causal int": ALLOWED[:, None].long(),
    "(B, 1, T, T) causal additive": additive(ALLOWED[:, None]),
    "(B, 1, T, T) causal, least float": additive(ALLOWED[:, None], LEAST),
    "(B, 4, T, T) of heads": ALLOWED[:, None].expand(B, 4, T, T),
    "(B, T, T) causal bool": ALLOWED,
    "(B, 1, T) int": REAL[:, None].long(),
    "requires a gradient": REAL.float().requires_grad_(),
}


@pytest.mark.parametrize("mask", FORMS.values(), ids=FORMS)
def test_every_usual_form(mask: Any) -> None:
    """Promise: bool, int, float 0/1, additive, 4-D, numpy, list: padding does not count, whatever
    the form in which the mask says so.
    """
    assert_right({"x": inputs(), "attention_mask": mask})


RARE: dict[str, Any] = {
    "list of tensors": list(REAL.long()),
    "flat": REAL.long().flatten(),
    "(B, T, 1) int": REAL[..., None].long(),
    "transposed": REAL.long().T,
    "negative ones": -REAL.long(),
}


@pytest.mark.parametrize("mask", RARE.values(), ids=RARE)
def test_rare_forms_are_right_or_refused(mask: Any) -> None:
    """Promise: a form that nobody promised is read as meant, or refused."""
    try:
        assert_right({"x": inputs(), "attention_mask": mask})
    except ll.CalibrationError as error:
        if "mask" not in str(error):
            raise


@pytest.mark.parametrize("form", ["(B, T)", "(B, 1, 1, T)", "causal", "causal additive"])
def test_padding_on_the_left(form: str) -> None:
    """Promise: on the left too, where a causal mask has rows that allow nothing."""
    real = REAL.flip(1)
    allowed = (CAUSAL & real[:, None])[:, None]
    mask = {
        "(B, T)": real.long(),
        "(B, 1, 1, T)": real[:, None, None].long(),
        "causal": allowed,
        "causal additive": additive(allowed),
    }[form]
    assert_right({"x": inputs(real), "attention_mask": mask}, real)


@pytest.mark.parametrize("mask", [None, torch.ones(B, T), [[1] * T] * B, torch.zeros(B, 1, T, T)])
def test_masks_that_leave_nothing_out(mask: Any) -> None:
    """Promise: no mask, a mask of ones and an additive mask of zeros in its 4-D form count all."""
    everything = torch.ones(B, T, dtype=torch.bool)
    assert_right({"x": inputs(everything), "attention_mask": mask}, everything)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(B, T + 1),
        torch.ones(B + 1, T),
        torch.ones(T, B),
        torch.ones(3, 1, 4, 5),
        torch.ones(B * T + 1),
        [[1, 1], [1]],
        [["a"] * T] * B,
        "text",
        3,
        np.ones((B, 2)),
        object(),
        torch.ones(B, T) * 1j,
        torch.full((B, T), float("nan")),
        torch.full((B, T), 0.5),
    ],
    ids=lambda mask: str(tuple(mask.shape)) if hasattr(mask, "shape") else str(mask)[:12],
)
def test_a_mask_that_cannot_be_matched(untouched: Any, mask: Any) -> None:
    """Promise: a mask that is none, or that fits no activation, is an error that names it and the
    shapes; padding is never counted without a word."""
    model = Net()
    with untouched(model), pytest.raises(ll.CalibrationError, match="mask"):
        ll.attach(model, "eva", r=1, calibration=[{"x": inputs(), "attention_mask": mask}])


def test_all_padding(untouched: Any) -> None:
    """Promise: data that is all padding is an error, not a start from nothing."""
    model = Net()
    batch = {"x": inputs(), "attention_mask": torch.zeros(B, T, dtype=torch.long)}
    with untouched(model), pytest.raises(ll.CalibrationError):
        ll.attach(model, "eva", r=1, calibration=[batch])


def test_batches_of_any_mapping() -> None:
    """Promise: the mask is found in every mapping, a tokenizer's output included."""
    from transformers import BatchEncoding

    for form in (UserDict, BatchEncoding):
        assert_right(form({"x": inputs(), "attention_mask": REAL.long()}))


def test_each_batch_has_its_own_mask() -> None:
    """Promise: a batch without a mask after one with it counts all of its rows."""
    x, real = inputs(), REAL
    everything = torch.cat([x[real], x.reshape(-1, D)])
    adapter = ll.attach(
        Net(), "eva", r=1, center=False, calibration=[{"x": x, "attention_mask": real}, {"x": x}]
    )
    found = adapter.state_dict()["layers.0.A"].flatten()
    expected = torch.linalg.svd(everything.double()).Vh[0].float()
    assert abs(float(found @ expected)) > 1 - 1e-4


# --- encoders and decoders


SEEN: dict[str, int] = {}


class Rows:
    """How many rows a site saw."""

    def __init__(self, path: str) -> None:
        self.path = path
        SEEN[path] = 0

    def update(self, x: Tensor, y: Tensor) -> None:
        SEEN[self.path] += len(x)

    def result(self) -> dict[str, Tensor]:
        return {}


class Counting(Variant, name="counting_rows"):
    """Observes, and does nothing."""

    def observe(self, site: Site) -> Observer | None:
        return Rows(site.path)

    def tensors(self, site: Site) -> dict[str, TensorSpec]:
        return {"v": TensorSpec((site.d_out,))}

    def init(
        self, site: Site, derived: Tensors, statistics: Tensors, rng: Rng
    ) -> dict[str, Tensor]:
        return {"v": torch.zeros(site.d_out)}

    def delta_output(self, site: Site, t: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return t["v"].expand_as(y)


def tiny_bart() -> nn.Module:
    """An encoder and a decoder of one block each."""
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    model: nn.Module = BartForConditionalGeneration(
        BartConfig(
            vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
            max_position_embeddings=32,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
            forced_eos_token_id=2,
        )
    )  # fmt: skip
    return model


def tiny_t5() -> nn.Module:
    """Likewise, of another family."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model: nn.Module = T5ForConditionalGeneration(
        T5Config(
            vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, pad_token_id=0,
            decoder_start_token_id=0,
        )
    )  # fmt: skip
    return model


CROSS = ("encoder_attn", "EncDecAttention")


@pytest.mark.parametrize("same_length", [False, True], ids=["other lengths", "one length"])
@pytest.mark.parametrize("make", [tiny_bart, tiny_t5], ids=["bart", "t5"])
def test_encoder_and_decoder_masks(make: Callable[[], nn.Module], same_length: bool) -> None:
    """Promise: `attention_mask` goes to the encoder's layers and to what the decoder reads of it,
    `decoder_attention_mask` to the decoder's; also where source and target have one length."""
    source = 6
    target = source if same_length else 4
    encoder_mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])
    decoder_mask = torch.tensor([[1] * target, [1] + [0] * (target - 1)])
    batch = {
        "input_ids": torch.randint(3, 32, (2, source)),
        "attention_mask": encoder_mask,
        "decoder_input_ids": torch.randint(3, 32, (2, target)),
        "decoder_attention_mask": decoder_mask,
    }
    SEEN.clear()
    ll.attach(make(), Counting(), calibration=[batch])
    assert any("encoder." in path for path in SEEN)
    rows_of = {"encoder": int(encoder_mask.sum()), "decoder": int(decoder_mask.sum())}
    for path, rows in SEEN.items():
        reads_encoder = "decoder." not in path or (
            any(part in path for part in CROSS) and path.endswith((".k", ".v", "k_proj", "v_proj"))
        )
        if same_length and reads_encoder and "decoder." in path:
            continue  # its rows cannot be told apart by their shape
        assert rows == rows_of["encoder" if reads_encoder else "decoder"], path


@pytest.mark.parametrize("given", ["attention_mask", "decoder_attention_mask"])
def test_only_one_of_both_masks(given: str) -> None:
    """Promise: the layers of the other half count all of their rows."""
    batch = {
        "input_ids": torch.randint(3, 32, (2, 6)),
        "decoder_input_ids": torch.randint(3, 32, (2, 4)),
        given: torch.tensor([[1] * 4, [1, 1, 0, 0]])
        if given.startswith("decoder")
        else torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]]),
    }
    SEEN.clear()
    ll.attach(tiny_bart(), Counting(), calibration=[batch])
    masked = given.startswith("decoder")
    for path, rows in SEEN.items():
        if "encoder_attn" in path:
            continue
        inside_decoder = "decoder." in path
        full = 8 if inside_decoder else 12
        assert rows == (int(batch[given].sum()) if inside_decoder == masked else full), path
