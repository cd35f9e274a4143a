"""The base model and its tokenizer, from the package, a local directory, or the hub."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_lite_benchmark.config import TINY, RunConfig, model_digest
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.tiny import MODEL_DIR

__all__ = ["load_model", "load_tokenizer"]


def load_model(config: RunConfig, device: torch.device | str = "cpu") -> nn.Module:
    """A fresh copy of the base, in eval mode. Raises BenchmarkError saying which path or id could not be loaded."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = _load(
        AutoModelForCausalLM, config.model, config.model_sha256, config.revision, dtype=getattr(torch, config.dtype)
    )
    return model.to(device).eval()


def load_tokenizer(config: RunConfig) -> Any:
    """The model's tokenizer; where it has no padding token, the end of text stands in (attention masks it)."""
    return _tokenizer(config.model, config.model_sha256, config.revision)


@functools.lru_cache(maxsize=1)
def _tokenizer(model: str, digest: str | None, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, model, digest, revision)
    if tokenizer.eos_token_id is None:
        raise BenchmarkError(f"{model}: the tokenizer has no end-of-text token; answers could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(kind: Any, model: str, digest: str | None, revision: str | None, **options: Any) -> Any:
    path = str(MODEL_DIR) if model == TINY else model
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise BenchmarkError(f"{path}: the directory holds no config.json; expected a model saved by save_pretrained")
    if digest and digest != model_digest(Path(path)):
        raise BenchmarkError(f"{path}: the model's files have changed since this run was planned; start it again")
    try:
        return kind.from_pretrained(path, revision=revision or "main", **options)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BenchmarkError(f"model {path!r} cannot be loaded: {reason}") from error
