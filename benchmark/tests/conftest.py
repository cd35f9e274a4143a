"""What the tests run on: a random Llama of a few thousand weights with a tokenizer of characters,
and sums to learn. It is real, small, and needs no network.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.preset import Preset, resolve
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "".join(chr(code) for code in range(32, 127)) + "\n"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as `save_pretrained` leaves it."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {"<pad>": 0, "<eos>": 1} | {
        character: index + 2 for index, character in enumerate(CHARACTERS)
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`train` in the format of MetaMathQA, `test` in that of GSM8K: sums of two digits."""
    folder = tmp_path_factory.mktemp("data")
    sums = [(a, b) for a in range(10) for b in range(10)]
    train = [
        {"query": f"What is {a}+{b}?", "response": f"It is {a + b}.\nThe answer is: {a + b}"}
        for a, b in sums[::2]
    ]
    test = [
        {"question": f"What is {a}+{b}?", "answer": f"It is {a + b}.\n#### {a + b}"}
        for a, b in sums[1::8]
    ]
    paths = {"train": folder / "train.jsonl", "test": folder / "test.jsonl"}
    for name, rows in (("train", train), ("test", test)):
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return paths


@pytest.fixture(scope="session")
def settings(model_dir: Path, files: dict[str, Path]) -> dict[str, Any]:
    """Overrides of the tiny preset that make a run of a second or two."""
    return {
        "model": str(model_dir),
        "layers": None,
        "train": {"path": str(files["train"])},
        "test": {"path": str(files["test"])},
        "validation": None,
        "steps": 6,
        "batch_size": 4,
        "max_new_tokens": 8,
        "eval_batch_size": 4,
    }


@pytest.fixture(scope="session")
def make_config(settings: dict[str, Any]) -> Callable[..., RunConfig]:
    """`make_config("lora:r=2", steps=3)`: the config of a row, with overrides."""

    def make(row: str = "lora", **overrides: Any) -> RunConfig:
        return resolve(Preset.load("tiny"), row, **{**settings, **overrides})

    return make


@pytest.fixture(scope="session")
def arguments(model_dir: Path, files: dict[str, Path]) -> list[str]:
    """The same overrides as options of the command."""
    train, test = str(files["train"]), str(files["test"])
    small = ["--steps", "6", "--batch-size", "4", "--max-new-tokens", "8", "--eval-batch-size", "4"]
    return ["--model", str(model_dir), "--train", train, "--test", test, *small]
