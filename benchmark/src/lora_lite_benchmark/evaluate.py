"""How good a model is: exact match of the final number, and the loss of the reference answer."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from lora_lite_benchmark.answers import final_number, is_correct
from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.data import IGNORED, Batch, Example, Problem, collate, encode, prompt_ids
from lora_lite_benchmark.processes import divided, is_sharded
from lora_lite_benchmark.results import Outcome

__all__ = ["evaluate", "generate", "nats", "score", "weigh"]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    config: RunConfig,
    problems: Sequence[Problem],
    name: str,
    accelerator: Accelerator,
) -> list[Outcome]:
    """The outcome of every problem, in order, in every process. `model` must be in eval mode."""
    texts = [""] * len(problems)
    if config.generates:
        texts = generate(model, tokenizer, config, problems, name, accelerator)
    scores = score(model, tokenizer, config, problems, name, accelerator)
    return [
        _outcome(problem, text, loss, tokens)
        for problem, text, (loss, tokens) in zip(problems, texts, scores, strict=True)
    ]


def _outcome(problem: Problem, text: str, loss: float, tokens: int) -> Outcome:
    number = final_number(text)
    return Outcome(
        question=problem.question,
        reference=str(final_number(problem.answer)),
        prediction=text,
        number=None if number is None else str(number),
        correct=is_correct(text, problem.answer),
        nats=loss,
        tokens=tokens,
    )


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    config: RunConfig,
    problems: Sequence[Problem],
    name: str,
    accelerator: Accelerator,
) -> list[str]:
    """What the model writes after each prompt, greedily, up to its end of text or to
    `max_new_tokens`.
    """
    from transformers import GenerationConfig

    greedy = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    prompts = [prompt_ids(tokenizer, config.prompt, problem) for problem in problems]

    def write(rows: list[int]) -> list[str]:
        ids, mask = _pad_left([prompts[row] for row in rows], tokenizer.pad_token_id)
        written = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=greedy,
            synced_gpus=is_sharded(accelerator),
        )
        new_tokens = written[:, ids.shape[1] :]
        texts: list[str] = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        return texts

    batches = _batches(map(len, prompts), config.eval_batch_size)
    return divided(batches, write, accelerator, f"{name}: generate")


def score(
    model: Any,
    tokenizer: Any,
    config: RunConfig,
    problems: Sequence[Problem],
    name: str,
    accelerator: Accelerator,
) -> list[tuple[float, int]]:
    """For each problem, the nats of its reference answer and how many tokens that answer has."""
    examples = [encode(tokenizer, config.prompt, problem) for problem in problems]
    return weigh(model, tokenizer, config, examples, name, accelerator)


@torch.no_grad()
def weigh(
    model: Any,
    tokenizer: Any,
    config: RunConfig,
    examples: Sequence[Example],
    name: str,
    accelerator: Accelerator,
) -> list[tuple[float, int]]:
    """For each example, the nats of the tokens that count, and how many these are."""

    def one_batch(rows: list[int]) -> list[tuple[float, int]]:
        chosen = [examples[row] for row in rows]
        losses = nats(model, collate(chosen, tokenizer.pad_token_id).to(model.device)).tolist()
        tokens = [len(example.ids) - example.start for example in chosen]
        return list(zip(losses, tokens, strict=True))

    batches = _batches((len(example.ids) for example in examples), config.eval_batch_size)
    return divided(batches, one_batch, accelerator, f"{name}: loss")


def nats(model: nn.Module, batch: Batch) -> Tensor:
    """The negative log likelihood of each row's answer, shape (rows,), in float32."""
    logits = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).logits
    labels = batch.labels[:, 1:]
    losses = functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
    return losses.view_as(labels).sum(dim=1)


def _batches(lengths: Iterable[int], size: int) -> list[list[int]]:
    """Indices in batches of similar length, which need little padding.

    The longest come first: if memory runs out, it does so at once.
    """
    by_length = sorted(enumerate(lengths), key=lambda pair: -pair[1])
    order = [index for index, _ in by_length]
    return [order[start : start + size] for start in range(0, len(order), size)]


def _pad_left(prompts: Sequence[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, each (rows, tokens). All rows end where generation starts."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask
