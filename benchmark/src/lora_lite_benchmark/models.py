"""The base model and its tokenizer, from the package, a local directory, or the hub."""

import functools
import importlib.util
import logging
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

    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    if config.quantization != "none":
        options |= {
            "quantization_config": _quantization(config, options["dtype"]),
            "device_map": {"": device},
        }
    model: nn.Module = _load(
        AutoModelForCausalLM, config.model, config.model_sha256, config.revision, **options
    )
    return (model if config.quantization != "none" else model.to(device)).eval()


def _quantization(config: RunConfig, dtype: torch.dtype) -> Any:
    """How transformers is told to quantise while it loads; 4-bit as in QLoRA, with quantised scales."""
    from transformers import BitsAndBytesConfig

    for package in ("bitsandbytes", "lora_lite_bitsandbytes"):
        if importlib.util.find_spec(package) is None:
            raise BenchmarkError(
                f"quantization={config.quantization}: {package} is missing; pip install lora-lite-bitsandbytes"
            )
    if config.quantization == "int8":
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(
            logging.ERROR
        )  # a line for every layer and forward
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def load_tokenizer(config: RunConfig) -> Any:
    """The model's tokenizer; where it has no padding token, the end of text stands in (attention masks it)."""
    return _tokenizer(config.model, config.model_sha256, config.revision)


@functools.lru_cache(maxsize=1)
def _tokenizer(model: str, digest: str | None, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, model, digest, revision)
    if tokenizer.eos_token_id is None:
        raise BenchmarkError(
            f"{model}: the tokenizer has no end-of-text token; answers could not end"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(kind: Any, model: str, digest: str | None, revision: str | None, **options: Any) -> Any:
    path = str(MODEL_DIR) if model == TINY else model
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise BenchmarkError(
            f"{path}: the directory holds no config.json; expected a model saved by save_pretrained"
        )
    if digest and digest != model_digest(Path(path)):
        raise BenchmarkError(
            f"{path}: the model's files have changed since this run was planned; start it again"
        )
    try:
        return kind.from_pretrained(path, revision=revision or "main", **options)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BenchmarkError(f"model {path!r} cannot be loaded: {reason}") from error
