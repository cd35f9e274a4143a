"""Questions and answers, and the tensors that a model sees of them.

A row has the columns of MetaMathQA (`query`, `response`) or of GSM8K (`question`, `answer`); both
serve for training and for testing. An example is the tokens of the prompt, then those of the
answer, then the end-of-text token. The loss counts the last two.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_lite_benchmark.config import RunConfig, Source
from lora_lite_benchmark.embedded import TASKS, EmbeddedTask
from lora_lite_benchmark.errors import BenchmarkError

__all__ = [
    "Batch",
    "Example",
    "Problem",
    "collate",
    "encode",
    "held_out_examples",
    "load_problems",
    "prompt_ids",
    "training_examples",
]

COLUMNS = (("query", "response"), ("question", "answer"))
"""The names of the two columns in MetaMathQA and in GSM8K."""

IGNORED = -100
"""The label of a position that is not part of an answer."""

EMBEDDED_TRAINING_ROWS = 10_000
"""How many embedded training problems are made if the source does not say."""

EMBEDDED_HOME_ROWS = 200
"""How many problems of what an embedded base was pretrained on."""

TEXT = "text"
SHORTEST_TEXT = 200
"""In letters: shorter rows of a data set of texts are titles and empty lines."""


class Problem(NamedTuple):
    question: str
    answer: str


class Example(NamedTuple):
    """One problem as token ids: prompt, answer, end of text. The answer starts at index `start`."""

    ids: list[int]
    start: int


class Batch(NamedTuple):
    """Examples padded on the right: three tensors of shape (rows, tokens).

    `labels` holds the token ids of the answers and IGNORED elsewhere.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in self))

    @property
    def answer_tokens(self) -> int:
        return int((self.labels != IGNORED).sum())


# Three, because all rows of a command share their training, validation and test problems.
@functools.lru_cache(maxsize=3)
def load_problems(source: Source) -> list[Problem]:
    """The problems of `source`, in order.

    Raises BenchmarkError if it cannot be read, has no such rows, has other columns, or has a row
    without text.
    """
    return _problems_of(source, _rows(source))


def _problems_of(source: Source, rows: Any) -> list[Problem]:
    chosen = range(len(rows))[source.start : source.stop]
    if not chosen:
        raise BenchmarkError(
            f"{source.path} has no rows from number {source.start} on",
            expected=f"It has {len(rows)} rows",
        )
    rows = [rows[index] for index in chosen] if isinstance(rows, list) else rows.select(chosen)
    question, answer = _columns(source, list(rows[0]))
    problems = [Problem(row[question], row[answer]) for row in rows]
    for number, problem in enumerate(problems, start=source.start):
        if not all(isinstance(text, str) and text.strip() for text in problem):
            raise BenchmarkError(
                f"row {number} of {source.path} has no text",
                expected=f"Both of its columns {question!r} and {answer!r} must hold text",
            )
    return problems


def _rows(source: Source) -> Any:
    """A list or a `datasets.Dataset` of all rows."""
    task = TASKS.get(source.path)
    return _embedded_rows(task, source) if task else _dataset(source)


def held_out_examples(tokenizer: Any, config: RunConfig) -> list[Example]:
    """The rows of `config.forgetting` as tokens: texts, of which every token counts but the first,
    or problems, of which the answer counts. Long ones are cut at `max_tokens`. Empty without it.
    """
    source = config.forgetting
    if source is None:
        return []
    rows = _rows(source)
    if TEXT not in rows[0]:
        problems = _problems_of(source, rows)
        examples = [encode(tokenizer, config.prompt, problem) for problem in problems]
        return [example for example in examples if len(example.ids) <= config.max_tokens]
    texts = [row[TEXT] for row in rows if len(row[TEXT]) >= SHORTEST_TEXT]
    chosen = texts[source.start : source.stop]
    if not chosen:
        raise BenchmarkError(
            f"{source.path} has no text of {SHORTEST_TEXT} letters from number {source.start} on",
            expected=f"Its column `{TEXT}` has {len(texts)} of them",
        )
    ids = tokenizer(chosen).input_ids
    return [Example(each[: config.max_tokens], 1) for each in ids]


def _columns(source: Source, given: Sequence[str]) -> tuple[str, str]:
    """The names of the question's and the answer's column."""
    for question, answer in COLUMNS:
        if question in given and answer in given:
            return question, answer
    raise BenchmarkError(
        f"{source.path} has the columns {', '.join(map(repr, given))}",
        expected="Expected `query` and `response`, or `question` and `answer`",
    )


def _embedded_rows(task: EmbeddedTask, source: Source) -> list[dict[str, str]]:
    stop = source.stop
    if source.split == "train":
        return task.train(stop or EMBEDDED_TRAINING_ROWS)
    if source.split == "home":
        return task.home(stop or EMBEDDED_HOME_ROWS)
    make = task.validation if source.split == "validation" else task.test
    return make(stop) if stop else make()


def _dataset(source: Source) -> Any:
    """A `datasets.Dataset`, from a JSON-lines file or from the hub."""
    is_file = source.sha256 is not None
    if not is_file and source.path.endswith((".json", ".jsonl")):
        raise BenchmarkError(
            f"there is no file {source.path}",
            expected="They come from a JSON-lines file, `tiny`, `skill`, or the hub",
        )

    import datasets

    datasets.disable_progress_bars()
    try:
        if is_file:
            return datasets.load_dataset("json", data_files=source.path, split="train")
        return datasets.load_dataset(source.path, source.name, split=source.split)
    # It raises a dozen unrelated classes, down to those of pyarrow and aiohttp.
    except Exception as error:
        raise (_file_error if is_file else _hub_error)(source.path, error) from error


def _file_error(path: str, error: Exception) -> BenchmarkError:
    """Names the first line that is not JSON, if that is the reason."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                json.loads(line)
            except json.JSONDecodeError as problem:
                return BenchmarkError(
                    f"line {number} of {path} is not JSON: {problem.msg}",
                    expected="Every line must be a JSON object",
                )
    return BenchmarkError(f"{path} cannot be read: {_first_line(error)}")


def _hub_error(path: str, error: Exception) -> BenchmarkError:
    return BenchmarkError(
        f"{path} is neither a file here nor a dataset of the hub that can be reached: "
        f"{_first_line(error)}"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def training_examples(tokenizer: Any, config: RunConfig) -> tuple[list[Example], int]:
    """The training rows as tokens, and how many were left out as longer than `max_tokens`."""
    encoded = _encode_all(tokenizer, config.prompt, config.train)
    kept = [example for example in encoded if len(example.ids) <= config.max_tokens]
    if not kept:
        shortest = min(len(example.ids) for example in encoded)
        raise BenchmarkError(
            f"no row of {config.train.path} fits max_tokens={config.max_tokens}",
            expected=f"The shortest row has {shortest} tokens",
        )
    return kept, len(encoded) - len(kept)


@functools.lru_cache(maxsize=1)
def _encode_all(tokenizer: Any, prompt: str, source: Source) -> list[Example]:
    return [encode(tokenizer, prompt, problem) for problem in load_problems(source)]


def prompt_ids(tokenizer: Any, prompt: str, problem: Problem) -> list[int]:
    ids: list[int] = tokenizer(prompt.replace("{question}", problem.question)).input_ids
    return ids


def encode(tokenizer: Any, prompt: str, problem: Problem) -> Example:
    """The tokens of one problem.

    Prompt and answer are tokenised apart, so that generation starts from the very prompt that the
    model was trained on.
    """
    start = prompt_ids(tokenizer, prompt, problem)
    answer: list[int] = tokenizer(f" {problem.answer}", add_special_tokens=False).input_ids
    return Example([*start, *answer, tokenizer.eos_token_id], len(start))


def collate(examples: Iterable[Example], pad: int) -> Batch:
    """A batch of the examples, padded with `pad` to the longest of them."""
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
