"""The base model and its tokenizer, from the package, a local directory, or the hub."""

import gc
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_lite_benchmark.config import TINY, RunConfig, model_digest
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.tiny import MODEL_DIR

__all__ = ["free_memory", "load_model", "load_tokenizer"]


def load_model(config: RunConfig, device: torch.device | str = "cpu") -> nn.Module:
    """A fresh copy of the base, in eval mode. Raises BenchmarkError saying which path or id could not be loaded."""
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, config, dtype=getattr(torch, config.dtype)).to(device).eval()  # type: ignore[no-any-return]


def load_tokenizer(config: RunConfig) -> Any:
    """The model's tokenizer; where it has no padding token, the end of text stands in (attention masks it)."""
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, config)
    if tokenizer.eos_token_id is None:
        raise BenchmarkError(f"{config.model}: the tokenizer has no end-of-text token; answers could not end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(kind: Any, config: RunConfig, **options: Any) -> Any:
    path = str(MODEL_DIR) if config.model == TINY else config.model
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise BenchmarkError(f"{path}: the directory holds no config.json; expected a model saved by save_pretrained")
    if config.model_sha256 and config.model_sha256 != model_digest(Path(path)):
        raise BenchmarkError(f"{path}: the model's files have changed since this run was planned; start it again")
    try:
        return kind.from_pretrained(path, revision=config.revision or "main", **options)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BenchmarkError(f"model {path!r} cannot be loaded: {reason}") from error


def free_memory() -> None:
    """Hand back what the last run left, so that the next one's memory is its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
