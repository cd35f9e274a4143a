"""The global settings of torch that a variant has to leave as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

READERS: dict[str, Callable[[], Any]] = {
    "default dtype": torch.get_default_dtype,
    "gradients": torch.is_grad_enabled,
    "threads": torch.get_num_threads,
    "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    "default device": torch.get_default_device,
    "precision of float32 products": torch.get_float32_matmul_precision,
}


@contextmanager
def settings_stay(what: str) -> Iterator[None]:
    """An assertion that the block changes no setting; those that others would feel are set back."""
    before = _settings()
    yield
    after = _settings()
    torch.set_default_dtype(before["default dtype"])
    torch.set_float32_matmul_precision(before["precision of float32 products"])
    assert after == before, f"{what} changed {before} to {after}"


def _settings() -> dict[str, Any]:
    return {name: reader() for name, reader in READERS.items()}
