"""The base model and its tokenizer: from the package, from a local directory, or from the hub."""

import functools
import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.embedded import TASKS
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.files import model_digest

__all__ = ["load_model", "load_skeleton", "load_tokenizer"]

QUANTIZATION_PACKAGES = ("bitsandbytes", "lora_lite_bitsandbytes")


def load_model(config: RunConfig, device: torch.device | str = "cpu") -> nn.Module:
    """A fresh copy of the base, in eval mode. Raises BenchmarkError if it cannot be loaded."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    quantized = config.quantization != "none"
    if quantized:
        options["quantization_config"] = _quantization(config, options["dtype"])
        options["device_map"] = {"": device}
    model: nn.Module = _load(
        AutoModelForCausalLM, config.model, config.model_sha256, config.revision, **options
    )
    if quantized:
        _keep_plain(model)
    else:
        model = model.to(device)
    return model.eval()


def _keep_plain(model: nn.Module) -> None:
    """Forbid 4-bit layers to pack themselves when they are evaluated, as an adapter does.

    On CPUs with AVX512-bf16 a packed layer has other weights and no backward, so a base would not
    be the one that the adapters have.
    """
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def load_skeleton(config: RunConfig) -> nn.Module:
    """The base without its weights, to count on. Raises BenchmarkError as `load_model` does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = _load(AutoConfig, config.model, config.model_sha256, config.revision)
    with torch.device("meta"):
        skeleton: nn.Module = AutoModelForCausalLM.from_config(settings)
    return skeleton


def _quantization(config: RunConfig, dtype: torch.dtype) -> Any:
    """How transformers quantises while it loads. 4-bit bases have quantised scales, as in QLoRA
    (Dettmers et al. 2023, arXiv:2305.14314).
    """
    from transformers import BitsAndBytesConfig

    for package in QUANTIZATION_PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise BenchmarkError(
                f"quantization is {config.quantization!r}, and {package} is not installed",
                fix="Run pip install lora-lite-bitsandbytes",
            )
    if config.quantization == "int8":
        # It logs a line for every layer and forward.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def load_tokenizer(config: RunConfig) -> Any:
    """The model's tokenizer.

    If it has no padding token, the end-of-text token takes its place; the attention mask hides it.
    """
    return _tokenizer(config.model, config.model_sha256, config.revision)


@functools.lru_cache(maxsize=1)
def _tokenizer(model: str, digest: str | None, revision: str | None) -> Any:
    from transformers import AutoTokenizer

    tokenizer = _load(AutoTokenizer, model, digest, revision)
    if tokenizer.eos_token_id is None:
        raise BenchmarkError(
            f"the tokenizer of {model} has no end-of-text token",
            expected="Without one, a model cannot end its answers",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(kind: Any, model: str, digest: str | None, revision: str | None, **options: Any) -> Any:
    """`kind.from_pretrained`, after checking that a local directory is what the config says."""
    path = str(TASKS[model].model_dir) if model in TASKS else model
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise BenchmarkError(
            f"the directory {path} holds no config.json",
            expected="A local model is a directory written by save_pretrained",
        )
    if digest and digest != model_digest(Path(path)):
        raise BenchmarkError(
            f"the files of the model in {path} have changed since this run was planned",
            fix="Start the command again",
        )
    try:
        return kind.from_pretrained(path, revision=revision or "main", **options)
    except (OSError, ValueError, KeyError) as error:
        message = str(error).strip() or type(error).__name__
        raise BenchmarkError(
            f"model {path!r} cannot be loaded",
            expected=f"transformers says: {message.splitlines()[0]}",
        ) from error
