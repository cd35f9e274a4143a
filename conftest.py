"""Fixtures shared by the tests of every package: tiny models, and guards around them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor, nn


@pytest.fixture(autouse=True)
def _quiet_torch() -> None:
    """One thread, for equal bits whatever the machine, and a fixed random state."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


class Block(nn.Module):
    """A residual block of two linear layers, one of them without bias."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The residual step, x + down(relu(up(x)))."""
        out: Tensor = x + self.down(torch.relu(self.up(x)))
        return out


class Blocks(nn.Module):
    """A model of plain torch: `stem`, `blocks.<i>.up` and `blocks.<i>.down`, and `lm_head`."""

    def __init__(self, depth: int = 2, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.blocks = nn.ModuleList([Block(width, hidden) for _ in range(depth)])
        self.lm_head = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of x (..., width). The mask is only there for the tests of calibration."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.lm_head(x)
        return out


@pytest.fixture
def blocks() -> Callable[..., Blocks]:
    """Makes `Blocks` models with fixed weights."""

    def make(depth: int = 2, width: int = 8, hidden: int = 12) -> Blocks:
        torch.manual_seed(0)
        return Blocks(depth, width, hidden)

    return make


@pytest.fixture
def tiny_llama() -> Callable[..., nn.Module]:
    """Makes Llama models of transformers, two layers of width 16, with fixed weights."""

    def make(**config: Any) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        torch.manual_seed(0)
        model: nn.Module = LlamaForCausalLM(
            LlamaConfig(
                **{
                    **sizes,
                    "vocab_size": 32,
                    "pad_token_id": 0,
                    "eos_token_id": 1,
                    "bos_token_id": 2,
                    **config,
                }
            )
        )
        return model

    return make


@pytest.fixture
def tiny_gpt2() -> Callable[..., nn.Module]:
    """Makes GPT-2 models of transformers, two layers of width 16, with fixed weights.

    Their linear layers are `Conv1D`.
    """

    def make() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        model: nn.Module = GPT2LMHeadModel(
            GPT2Config(
                n_embd=16,
                n_layer=2,
                n_head=2,
                n_positions=32,
                vocab_size=32,
                bos_token_id=2,
                eos_token_id=1,
            )
        )
        return model.eval()

    return make


@pytest.fixture
def untouched() -> Callable[[nn.Module], AbstractContextManager[None]]:
    """A context in which a model must not change: no bit, no flag, no hook, no attribute."""

    @contextmanager
    def guard(model: nn.Module) -> Iterator[None]:
        before = snapshot(model)
        yield
        after = snapshot(model)
        assert after.keys() == before.keys()
        for key, value in before.items():
            same = (
                torch.equal(after[key], value) if isinstance(value, Tensor) else after[key] == value
            )
            assert same, f"{key} changed: {value} -> {after[key]}"

    return guard


@pytest.fixture
def refused(
    untouched: Callable[[nn.Module], AbstractContextManager[None]],
) -> Callable[..., AbstractContextManager[Any]]:
    """A context in which one error must be raised, and a model must not change.

    The error is of exactly this class and has these fields. `says` lists what a reader must find in
    its message: names and values, not sentences, which may be worded better some day.
    """

    @contextmanager
    def guard(
        model: nn.Module | None, error: type[Exception], says: tuple[str, ...] = (), **fields: Any
    ) -> Iterator[Any]:
        with ExitStack() as stack:
            if model is not None:
                stack.enter_context(untouched(model))
            caught = stack.enter_context(pytest.raises(error))
            yield caught
        assert type(caught.value) is error, repr(caught.value)
        told = {name: _plain(getattr(caught.value, name)) for name in fields}
        assert told == {name: _plain(value) for name, value in fields.items()}
        for text in says:
            assert text in str(caught.value), f"{text!r} is not in: {caught.value}"

    return guard


@pytest.fixture(scope="session")
def rewrite() -> Callable[..., None]:
    """Changes the tensors and the metadata of an adapter's file, and gives it the digest of both.

    So what is found wrong afterwards is found by looking at the contents, not by the digest.
    """

    def change_file(
        path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]
    ) -> None:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            header = json.loads(file.metadata()["lora_lite"])
        change(tensors, header)
        zeros = "0" * 64
        data = save(tensors, {"lora_lite": json.dumps({**header, "digest": zeros})})
        digest = hashlib.sha256(data).hexdigest()
        path.write_bytes(data.replace(zeros.encode(), digest.encode(), 1))

    return change_file


def _plain(value: Any) -> Any:
    """Lists and tuples alike."""
    return tuple(value) if isinstance(value, list | tuple) else value


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that an adapter could leave a trace in."""
    seen: dict[str, Any] = {}
    for path, module in model.named_modules():
        seen[f"{path} attributes"] = sorted(module.__dict__)
        seen[f"{path} class"] = type(module)
        seen[f"{path} training"] = module.training
        for hooks in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_forward_hooks_with_kwargs",
        ):
            seen[f"{path} {hooks}"] = dict(getattr(module, hooks))
        for name, tensor in [
            *module.named_parameters(recurse=False),
            *module.named_buffers(recurse=False),
        ]:
            seen[f"{path}.{name}"] = tensor.detach().clone()
            seen[f"{path}.{name} flags"] = (
                tensor.requires_grad,
                tensor.dtype,
                tensor.device,
                id(tensor),
                tensor._version,
            )
    seen["state_dict keys"] = list(model.state_dict())
    return seen
