"""Questions, answers, and the tensors made of them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_lite_benchmark.config import RunConfig, Source
from lora_lite_benchmark.data import (
    IGNORED,
    Example,
    Problem,
    collate,
    encode,
    load_problems,
    prompt_ids,
    training_examples,
)
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.files import sha256
from lora_lite_benchmark.models import load_tokenizer

Make = Callable[..., RunConfig]


def local(path: Path, **options: Any) -> Source:
    return Source(path=str(path), sha256=sha256(path), **options)


def test_both_formats_are_read(files: dict[str, Path]) -> None:
    """MetaMathQA's and GSM8K's columns give the same kind of problem, in the order of the file."""
    assert load_problems(local(files["train"]))[1] == Problem(
        "What is 0+2?", "It is 2.\nThe answer is: 2"
    )
    assert load_problems(local(files["test"]))[0] == Problem("What is 0+1?", "It is 1.\n#### 1")


def test_start_and_count(files: dict[str, Path]) -> None:
    """A slice is the slice of the file; more than there is gives what there is."""
    every = load_problems(local(files["train"]))
    assert load_problems(local(files["train"], start=3, count=4)) == every[3:7]
    assert load_problems(local(files["train"], start=45, count=40)) == every[45:]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"q": "a", "a": "b"}\n',
            "the columns 'q', 'a'. Expected `query` and `response`, or `question` and `answer`",
        ),
        ('{"query": "a", "response": "b"}\n{"query": \n', "line 2 of .* is not JSON"),
        (
            '{"query": "a", "response": "b"}\n{"query": "c", "response": " "}\n',
            "row 1 of .* has no text",
        ),
        ('{"query": "a", "response": 5}\n', "row 0 of .* has no text"),
    ],
)
def test_a_bad_file_is_named_with_its_fault(tmp_path: Path, text: str, message: str) -> None:
    """The error says which file, and which line or columns."""
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(BenchmarkError, match=message) as caught:
        load_problems(local(path))
    assert str(path) in str(caught.value)


def test_a_missing_file_is_not_asked_of_the_hub() -> None:
    """A mistyped file name is called that."""
    with pytest.raises(BenchmarkError, match=r"there is no file absent.jsonl"):
        load_problems(Source(path="absent.jsonl"))


def test_an_unreachable_dataset_is_named() -> None:
    """A name that is neither a file nor a dataset gives an error that says so."""
    with pytest.raises(BenchmarkError, match="nobody/nothing is neither a file here nor a dataset"):
        load_problems(Source(path="nobody/nothing"))


def test_an_empty_slice_is_an_error(files: dict[str, Path]) -> None:
    """Testing on nothing is not a result."""
    with pytest.raises(BenchmarkError, match="no rows from number 900 on"):
        load_problems(local(files["test"], start=900))


def test_the_loss_counts_the_answer_and_its_end(make_config: Make) -> None:
    """An example reads as the prompt, a space, the answer, end of text; labels are the part after
    the prompt.
    """
    config = make_config()
    tokenizer = load_tokenizer(config)
    example = encode(tokenizer, config.prompt, Problem("How?", "So {question}."))
    assert tokenizer.decode(example.ids) == "Question: How?\nAnswer: So {question}.<eos>"
    assert example.ids[: example.start] == prompt_ids(
        tokenizer, config.prompt, Problem("How?", "-")
    )
    assert tokenizer.decode(example.ids[example.start :]) == " So {question}.<eos>"


def test_padding_is_neither_seen_nor_scored() -> None:
    """Rows keep their own tokens; what is added to the right is masked and has no label."""
    batch = collate([Example([5, 6, 7, 1], 2), Example([8, 1], 1)], pad=1)
    assert batch.input_ids.tolist() == [[5, 6, 7, 1], [8, 1, 1, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 7, 1], [IGNORED, 1, IGNORED, IGNORED]]
    assert all(tensor.dtype == torch.long for tensor in batch)


def test_real_gsm8k_is_read() -> None:
    """GSM8K as published loads whole, from its own columns."""
    folder = os.environ.get("LORA_LITE_GSM8K")
    if not folder:
        pytest.skip(
            "LORA_LITE_GSM8K is not set: it names a folder with GSM8K's train.jsonl and test.jsonl"
        )
    problems = load_problems(local(Path(folder) / "test.jsonl"))
    assert len(problems) == 1319
    assert all("####" in problem.answer for problem in problems)


def test_rows_of_one_command_tokenise_once(make_config: Make) -> None:
    """Another variant, seed or learning rate uses the very examples of the row before; another
    prompt does not.
    """
    config = make_config("lora")
    first, _ = training_examples(load_tokenizer(config), config)
    again, _ = training_examples(
        load_tokenizer(config), make_config("ia3", seed=3, lr=0.5, targets=["k_proj$"])
    )
    assert all(one is two for one, two in zip(first, again, strict=True))
    other, _ = training_examples(load_tokenizer(config), make_config(prompt="{question}"))
    assert other != first
