"""The second embedded task: the generator's promises, the shipped model's size, and that the model
can follow every rule that it is asked for, and is seldom right when it is asked for none.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from lora_lite_benchmark.preset import Preset, resolve
from lora_lite_benchmark.pretraining import Pretraining, batch, layout, train_tokenizer
from lora_lite_benchmark.skill import (
    EDITION,
    MODEL_DIR,
    problems,
    test_problems,
    train_problems,
    validation_problems,
)
from lora_lite_benchmark.skill.pretrain import PRETRAINING
from lora_lite_benchmark.splits import distinct_problems
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

test_problems.__test__ = False  # type: ignore[attr-defined]  # a function of the package, not a test

ANSWER = re.compile(r"(\w+) (\w+)\n(\d+[+-]\d+=\d+\n){2}#### \d+")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[str]]:
    """The model's greedy answers, with the end token where it stops by itself."""

    def answer(questions: list[str]) -> list[str]:
        prompts = tokenizer(
            [layout(question, "")[0] for question in questions], return_tensors="pt", padding=True
        )
        output = model.generate(**prompts, max_new_tokens=64, do_sample=False)
        texts = tokenizer.batch_decode(output[:, prompts["input_ids"].shape[1] :])
        return [text.replace(tokenizer.pad_token, "").strip() for text in texts]

    return answer


def test_the_same_call_returns_the_same_problems() -> None:
    assert train_problems(50) == train_problems(50)
    assert train_problems(100)[:50] == train_problems(50)
    assert train_problems(50, seed=1) != train_problems(50, seed=2)


def test_an_edition_is_always_the_same_problems() -> None:
    """Configs name the problems by EDITION alone, which is their digest. If this fails, the
    problems have changed: the digest that is found is their new EDITION.
    """
    found = [train_problems(300), validation_problems(100), test_problems(100)]
    assert hashlib.sha256(json.dumps(found).encode()).hexdigest() == EDITION


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


def test_answers_are_right_and_follow_the_rule_of_their_place() -> None:
    """The sums are right, and they are those that the rule's formula says."""
    for row in test_problems():
        assert ANSWER.fullmatch(row["answer"]), row["answer"]
        first_line, first_sum, second_sum, last = row["answer"].splitlines()
        place, rule = first_line.split()
        assert f"at the {place}." in row["question"]
        assert rule == problems.RULES_ABROAD[place]
        for line in (first_sum, second_sum):
            left, right = line.split("=")
            assert eval(left) == int(right), line
        numbers = dict(
            zip(("has", "come", "go"), map(int, re.findall(r"\d+", row["question"])), strict=True)
        )
        left, sign, right, *then = problems.RULES[rule].split()
        numbers["result"] = eval(f"{left} {sign} {right}", {}, numbers)
        assert last == f"#### {eval(' '.join(['result', *then]), {}, numbers)}"


def test_no_question_abroad_says_what_is_meant() -> None:
    """Only the place tells: no sentence names a rule or a custom."""
    assert not [row for row in test_problems() if "Count by" in row["question"]]


def test_every_place_has_a_rule_of_its_own() -> None:
    """At home by either custom, and abroad. The customs agree nowhere, and each of them holds at
    half of the places abroad.
    """
    old, new, abroad = problems.OLD_CUSTOM, problems.NEW_CUSTOM, problems.RULES_ABROAD
    for rules in (old, new, abroad):
        assert sorted(rules) == sorted(problems.PLACES)
        assert sorted(rules.values()) == sorted(problems.RULES)
    assert not [place for place in problems.PLACES if old[place] == new[place]]
    kept = [place for place in problems.PLACES if abroad[place] == old[place]]
    assert len(kept) == 4
    assert all(abroad[place] == new[place] for place in problems.PLACES if place not in kept)


def test_the_shipped_files_are_small() -> None:
    assert sum(file.stat().st_size for file in Path(MODEL_DIR).iterdir()) <= 6e6


def test_the_shipped_tokenizer_is_what_the_script_trains(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert train_tokenizer(PRETRAINING.problem).get_vocab() == tokenizer.get_vocab()


def test_bfloat16_is_stored_and_float32_is_loaded_exactly(model: PreTrainedModel) -> None:
    """Every weight that a run starts from is a number that bfloat16 holds."""
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter.to(torch.bfloat16).float(), parameter)


def test_the_labels_of_pretraining_are_the_answers(tokenizer: PreTrainedTokenizerBase) -> None:
    """The loss of pretraining counts the answers and their end alone, on the same problems in every
    call.
    """
    plan = Pretraining(problems.problem_at_home, batch_size=4, steps=1)
    tokens, labels = batch(plan, tokenizer, step=7)
    again, _ = batch(plan, tokenizer, step=7)
    assert torch.equal(tokens, again)
    random = Random("0 step 7")
    for row in labels:
        _, answer = problems.problem_at_home(random)
        assert tokenizer.decode(row[row >= 0]) == f" {answer}<eos>"


def test_the_base_is_seldom_right_because_it_mixes_the_rules(
    answers: Callable[..., list[str]],
) -> None:
    """It names the place and answers in the format, but with a rule that is not the one meant."""
    rows = validation_problems(200)
    found = answers([row["question"] for row in rows])
    in_format = [ANSWER.fullmatch(answer.removesuffix("<eos>")) for answer in found]
    assert sum(map(bool, in_format)) >= 0.9 * len(rows)
    named = {match.group(2) for match in in_format if match}
    assert len(named) >= 3
    right = sum(answer == f"{row['answer']}<eos>" for answer, row in zip(found, rows, strict=True))
    assert right < 0.35 * len(rows)


def test_the_base_knows_both_customs_and_every_rule(answers: Callable[..., list[str]]) -> None:
    """Where a sentence names the rule or the custom, it follows the right rule, and most of its
    sums are right.
    """
    asked = [
        pair
        for pair in distinct_problems(problems.problem_at_home, "test", 300, seed=0)
        if "Count by" in pair[0]
    ]
    found = answers([question for question, _ in asked])
    follows = sum(
        answer.splitlines()[0] == truth.splitlines()[0]
        for answer, (_, truth) in zip(found, asked, strict=True)
    )
    right = sum(answer == f"{truth}<eos>" for answer, (_, truth) in zip(found, asked, strict=True))
    assert follows >= 0.97 * len(asked)
    assert right >= 0.75 * len(asked)


def test_the_preset_adapts_the_shipped_model_to_the_shipped_problems() -> None:
    config = resolve(Preset.load("skill"), "lora")
    assert (config.model, config.train.path, config.test and config.test.path) == ("skill",) * 3
    assert config.train.sha256 == EDITION
    assert config.model_sha256
