"""The embedded benchmark: the generator's promises, the shipped model's size, and what it can do
before adaptation.
"""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from lora_lite_benchmark.pretraining import layout, train_tokenizer
from lora_lite_benchmark.tiny import (
    EDITION,
    MODEL_DIR,
    problems,
    test_problems,
    train_problems,
    validation_problems,
)
from lora_lite_benchmark.tiny.pretrain import problem_at_home
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

test_problems.__test__ = False  # type: ignore[attr-defined]  # a function of the package, not a test

ANSWER = re.compile(r"(Each \w+ \w+ holds \d: \d\*\d=\d+\n){2}(\d+[+-]\d+=\d+\n){1,2}#### \d+")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: list[str]
) -> list[str]:
    """The model's answers, with the end token where it stops by itself."""
    prompts = tokenizer(
        [layout(question, "")[0] for question in questions], return_tensors="pt", padding=True
    )
    output = model.generate(**prompts, max_new_tokens=64, do_sample=False)
    answers = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :])
    return [answer.replace(tokenizer.pad_token, "") for answer in answers]


def final_number(answer: str) -> str:
    return answer.rpartition("#### ")[2].removesuffix("<eos>")


def test_the_same_call_returns_the_same_problems() -> None:
    assert train_problems(50) == train_problems(50)
    assert train_problems(100)[:50] == train_problems(50)
    assert train_problems(50, seed=1) != train_problems(50, seed=2)


def test_the_first_test_problem_is_the_same_on_every_machine() -> None:
    question = (
        "Hana has 3 green buckets and 5 dry cartons of stamps. Hana sells 25 stamps. "
        "How many stamps does Hana have now?"
    )
    answer = (
        "Each green bucket holds 8: 3*8=24\n"
        "Each dry carton holds 3: 5*3=15\n"
        "24+15=39\n"
        "39-25=14\n"
        "#### 14"
    )
    assert test_problems(1) == [{"question": question, "answer": answer}]


def test_an_edition_is_always_the_same_problems() -> None:
    """Configs name the problems by EDITION alone. If this fails, the problems have changed: give
    them a new EDITION, and put their digest here.
    """
    problems = [train_problems(300), validation_problems(100), test_problems(100)]
    digest = hashlib.sha256(json.dumps(problems).encode()).hexdigest()
    editions = {"6e1a6cf71576a37aace798c23763cce0369fad291188e08c39f0c9fa5b78b2ce": "8adc023b"}
    assert EDITION.startswith(editions[digest])


def test_counts_and_columns() -> None:
    assert [len(validation_problems()), len(test_problems())] == [500, 1319]
    assert {tuple(row) for row in train_problems(10)} == {("query", "response")}
    assert {tuple(row) for row in validation_problems() + test_problems()} == {
        ("question", "answer")
    }


def test_no_question_occurs_twice_or_in_two_splits() -> None:
    splits = [
        [row["query"] for row in train_problems(20_000)],
        [row["question"] for row in validation_problems(2000)],
        [row["question"] for row in test_problems()],
    ]
    everything = [question for split in splits for question in split]
    assert len(set(everything)) == len(everything)


def test_answers_are_right_and_in_the_format() -> None:
    for row in test_problems():
        assert ANSWER.fullmatch(row["answer"]), row["answer"]
        *calculations, last = row["answer"].splitlines()
        for line in calculations:
            left, right = line.rpartition(": ")[2].split("=")
            assert eval(left) == int(right), line
        assert last == f"#### {right}"


def test_no_size_is_the_same_in_both_countries() -> None:
    assert all(
        problems.HOME.sizes[pair] != problems.ABROAD.sizes[pair] for pair in problems.ABROAD.sizes
    )


def test_the_training_problems_name_every_pair() -> None:
    text = "\n".join(row["response"] for row in train_problems(5000))
    assert all(
        f"Each {look} {container} holds" in text for look, container in problems.ABROAD.sizes
    )


def test_the_shipped_files_are_small() -> None:
    assert sum(file.stat().st_size for file in Path(MODEL_DIR).iterdir()) <= 6e6


@pytest.mark.parametrize(
    "text", ["Ünï → 12 'x' $5.00\n\n  a .", "Natalia sold 48/2 = <<48/2=24>>24 clips \U0001f4ce"]
)
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_digit_is_a_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("1319") == ["1", "3", "1", "9"]


def test_the_shipped_tokenizer_is_what_the_script_trains(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert train_tokenizer(problem_at_home).get_vocab() == tokenizer.get_vocab()


def test_the_base_answers_in_the_format_but_seldom_right(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = validation_problems(200)
    answers = greedy(model, tokenizer, [row["question"] for row in rows])
    in_format = sum(bool(re.search(r"#### \d+<eos>$", answer)) for answer in answers)
    right = sum(
        final_number(answer) == final_number(row["answer"])
        for answer, row in zip(answers, rows, strict=True)
    )
    assert in_format >= 0.9 * len(rows)
    assert right < 0.15 * len(rows)


def test_the_base_is_right_about_its_own_country(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    home = problems.Country(problems.HOME.sizes, problems.ABROAD.parts)
    rows = problems.problems(home, "test", 100, seed=0)
    answers = greedy(model, tokenizer, [question for question, _ in rows])
    right = sum(
        final_number(answer) == final_number(truth)
        for answer, (_, truth) in zip(answers, rows, strict=True)
    )
    assert right >= 0.8 * len(rows)
