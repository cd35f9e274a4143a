"""Pretraining the small models that come with the package, each by a script of its own.

A byte-level tokenizer is trained, then a Llama of a million parameters on random problems, each of
which it sees once. If that was interrupted, the same command goes on from the last checkpoint,
which is `state.pt` in the output directory and is removed at the end. Seeds are fixed, so the data
are the same on every machine. The weights are the same up to the rounding of the machine's matrix
products.

The weights are stored in bfloat16. Loading them as float32 is exact, and every run starts from them
as they are stored.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lora_lite_benchmark.files import write_atomically

__all__ = ["Pretraining", "batch", "layout", "pretrain", "train_tokenizer"]

SEED = 0
LEARNING_RATE = 3e-3
WARMUP = 200
CHECKPOINT_EVERY = 100
CONTEXT = 4096
IGNORE = -100


@dataclass(frozen=True)
class Pretraining:
    """What one of the models is pretrained on.

    Attributes:
        problem: a random (question, answer).
        batch_size: problems of one step.
        steps: how many steps, unless the command line says otherwise.
    """

    problem: Callable[[Random], tuple[str, str]]
    batch_size: int
    steps: int


def pretrain(plan: Pretraining, description: str | None) -> None:
    """The command of a pretraining script: train the tokenizer and the model, and save both."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="directory for the model and its tokenizer"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=plan.steps,
        help=f"steps of {plan.batch_size} problems (default {plan.steps})",
    )
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(plan.problem)
    model = train_model(plan, tokenizer, arguments.steps, arguments.out / "state.pt")
    save_tokenizer(tokenizer, arguments.out)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    (arguments.out / "state.pt").unlink(missing_ok=True)


def train_tokenizer(
    problem: Callable[[Random], tuple[str, str]], vocabulary: int = 640, problems: int = 20_000
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that encodes any text without loss and every digit by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    random = Random(f"{SEED} tokenizer")
    bpe.train_from_iterator(("".join(layout(*problem(random))) for _ in range(problems)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Save the tokenizer under the class name that transformers 4 and 5 both load."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def layout(question: str, answer: str) -> tuple[str, str]:
    """The prompt and its completion, without the end token that follows."""
    return f"Question: {question}\nAnswer:", f" {answer}"


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The randomly initialised model, float32."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def train_model(
    plan: Pretraining, tokenizer: PreTrainedTokenizerFast, steps: int, checkpoint: Path
) -> LlamaForCausalLM:
    """AdamW on the tokens of the answers, with linear warm-up and cosine decay.

    Goes on from the checkpoint if there is one.
    """
    model = new_model(tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.1, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay(step, steps))
    stages = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    start = resume(checkpoint, stages)
    progress = tqdm(range(start, steps), initial=start, total=steps, desc="pretraining")
    for step in progress:
        tokens, labels = batch(plan, tokenizer, step)
        logits = model(input_ids=tokens).logits  # [problems, tokens, vocabulary]
        loss = cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE
        )
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(nats_per_token=f"{loss.item():.4f}")
        if (step + 1) % CHECKPOINT_EVERY == 0:
            save_checkpoint(checkpoint, stages, step + 1)
    return model


def batch(
    plan: Pretraining, tokenizer: PreTrainedTokenizerFast, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels of one step, each of shape (problems, tokens), padded on the right.

    Prompts and padding have the label IGNORE.
    """
    random = Random(f"{SEED} step {step}")
    texts = [layout(*plan.problem(random)) for _ in range(plan.batch_size)]
    prompts = tokenizer([prompt for prompt, _ in texts])["input_ids"]
    answers = tokenizer([answer + tokenizer.eos_token for _, answer in texts])["input_ids"]
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    tokens = torch.full((plan.batch_size, width), tokenizer.pad_token_id)
    labels = torch.full((plan.batch_size, width), IGNORE)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        tokens[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return tokens, labels


def decay(step: int, steps: int) -> float:
    """The factor of the learning rate: linear warm-up, then half a cosine down to zero."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, steps - WARMUP)))


def save_checkpoint(path: Path, stages: dict[str, Any], step: int) -> None:
    """Write the number of steps done and the state of every stage."""
    saved = {"step": step, **{name: stage.state_dict() for name, stage in stages.items()}}
    write_atomically(path, lambda temporary: torch.save(saved, temporary))


def resume(path: Path, stages: dict[str, Any]) -> int:
    """Restore what `save_checkpoint` wrote; the step to go on with, 0 without a checkpoint."""
    if not path.exists():
        return 0
    saved = torch.load(path)
    for name, stage in stages.items():
        stage.load_state_dict(saved[name])
    return int(saved["step"])
