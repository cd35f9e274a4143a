"""Questions and answers, and the tensors that a model sees of them.

A row has the columns of MetaMathQA (`query`, `response`) or of GSM8K (`question`, `answer`); both serve for training and
for testing. An example is the prompt's tokens, then the answer's, then the end-of-text token; the loss counts the last two.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_lite_benchmark import tiny
from lora_lite_benchmark.config import TINY, RunConfig, Source
from lora_lite_benchmark.errors import BenchmarkError

__all__ = [
    "Batch",
    "Example",
    "Problem",
    "collate",
    "encode",
    "load_problems",
    "prompt_ids",
    "training_examples",
]

FORMATS = (("query", "response"), ("question", "answer"))
IGNORED = -100
"""The label of a position that is no part of an answer."""


class Problem(NamedTuple):
    question: str
    answer: str


class Example(NamedTuple):
    """One problem as token ids: `ids` is prompt, answer, end of text; the answer starts at `start`."""

    ids: list[int]
    start: int


class Batch(NamedTuple):
    """Examples padded on the right: three tensors of (rows, tokens)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor  # the token ids of answers, IGNORED elsewhere

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))

    @property
    def answer_tokens(self) -> int:
        return int((self.labels != IGNORED).sum())


@functools.lru_cache(maxsize=3)  # train, validation and test are those of all rows of a command
def load_problems(source: Source) -> list[Problem]:
    """The rows of `source`, in order. Raises BenchmarkError naming the file or dataset and the columns it has."""
    rows = _tiny_rows(source) if source.path == TINY else _dataset(source)
    chosen = range(len(rows))[
        source.start : None if source.count is None else source.start + source.count
    ]
    if not chosen:
        raise BenchmarkError(f"{source.path}: no rows from {source.start} on; it has {len(rows)}")
    rows = [rows[index] for index in chosen] if isinstance(rows, list) else rows.select(chosen)
    question, answer = _columns(source, list(rows[0]))
    problems = [Problem(row[question], row[answer]) for row in rows]
    for number, problem in enumerate(problems, start=source.start):
        if not all(isinstance(text, str) and text.strip() for text in problem):
            raise BenchmarkError(
                f"{source.path}: row {number} has no text in {question!r} or in {answer!r}"
            )
    return problems


def _columns(source: Source, given: Sequence[str]) -> tuple[str, str]:
    for question, answer in FORMATS:
        if question in given and answer in given:
            return question, answer
    expected = " or ".join(f"`{question}` and `{answer}`" for question, answer in FORMATS)
    raise BenchmarkError(
        f"{source.path}: columns are {', '.join(map(repr, given))}; expected {expected}"
    )


def _tiny_rows(source: Source) -> list[dict[str, str]]:
    stop = None if source.count is None else source.start + source.count
    if source.split == "train":
        return tiny.train_problems(stop or 10_000)
    make = tiny.validation_problems if source.split == "validation" else tiny.test_problems
    return make(stop) if stop else make()


def _dataset(source: Source) -> Any:
    """A `datasets.Dataset`, from a JSON-lines file or from the hub."""
    import datasets

    datasets.disable_progress_bars()
    if source.sha256 is None and source.path.endswith((".json", ".jsonl")):
        raise BenchmarkError(f"{source.path}: there is no such file")
    try:
        if source.sha256 is not None:
            return datasets.load_dataset("json", data_files=source.path, split="train")
        return datasets.load_dataset(source.path, source.name, split=source.split)
    except (
        Exception
    ) as error:  # datasets raises a dozen unrelated classes, down to pyarrow's and aiohttp's
        raise BenchmarkError(f"{source.path}: {_why(source, error)}") from error


def _why(source: Source, error: Exception) -> str:
    if source.sha256 is not None:
        with open(source.path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                try:
                    json.loads(line)
                except json.JSONDecodeError as problem:
                    return f"line {number} is not JSON ({problem.msg}); expected one JSON object a line"
    what = (
        "cannot be read"
        if source.sha256
        else "is neither a file here nor a dataset of the hub that can be reached"
    )
    return f"{what}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def training_examples(tokenizer: Any, config: RunConfig) -> tuple[list[Example], int]:
    """The training rows as tokens, and how many were left out for being longer than `max_tokens`."""
    encoded = _encode_all(tokenizer, config.prompt, config.train)
    kept = [example for example in encoded if len(example.ids) <= config.max_tokens]
    if not kept:
        shortest = min(len(example.ids) for example in encoded)
        raise BenchmarkError(
            f"{config.train.path}: no row fits max_tokens={config.max_tokens}; the shortest has {shortest} tokens"
        )
    return kept, len(encoded) - len(kept)


@functools.lru_cache(maxsize=1)
def _encode_all(tokenizer: Any, prompt: str, source: Source) -> list[Example]:
    return [encode(tokenizer, prompt, problem) for problem in load_problems(source)]


def prompt_ids(tokenizer: Any, prompt: str, problem: Problem) -> list[int]:
    ids: list[int] = tokenizer(prompt.replace("{question}", problem.question)).input_ids
    return ids


def encode(tokenizer: Any, prompt: str, problem: Problem) -> Example:
    """Prompt and answer are tokenised apart, so that the prompt is the one that generation starts from."""
    start = prompt_ids(tokenizer, prompt, problem)
    answer: list[int] = tokenizer(f" {problem.answer}", add_special_tokens=False).input_ids
    return Example([*start, *answer, tokenizer.eos_token_id], len(start))


def collate(examples: Iterable[Example], pad: int) -> Batch:
    rows = list(examples)
    width = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), IGNORED)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, (ids, start) in enumerate(rows):
        input_ids[index, : len(ids)] = torch.tensor(ids)
        labels[index, start : len(ids)] = torch.tensor(ids[start:])
        attention_mask[index, : len(ids)] = 1
    return Batch(input_ids, attention_mask, labels)
