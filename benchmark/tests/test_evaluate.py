"""Generation and loss: what batching must not change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.data import Problem, encode, load_problems
from lora_lite_benchmark.evaluate import evaluate, generate, score
from lora_lite_benchmark.models import load_model, load_tokenizer
from torch.nn import functional

Make = Callable[..., RunConfig]
Setup = tuple[RunConfig, torch.nn.Module, Any, list[Problem]]


@pytest.fixture(scope="module")
def setup(make_config: Make) -> Setup:
    """A model, its tokenizer, and problems of different lengths."""
    config = make_config("base")
    assert config.test is not None
    problems = [
        Problem(p.question + "?" * (3 * i % 7), p.answer)
        for i, p in enumerate(load_problems(config.test))
    ]
    return config, load_model(config), load_tokenizer(config), problems


def test_generation_is_the_greedy_choice_token_by_token(setup: Setup) -> None:
    """A padded batch writes what picking the likeliest token of each problem alone, without a
    cache, writes.
    """
    config, model, tokenizer, problems = setup
    written = generate(model, tokenizer, config, problems, "test", Accelerator())
    for problem, text in zip(problems[:5], written[:5], strict=True):
        ids = tokenizer(config.prompt.replace("{question}", problem.question)).input_ids
        start = len(ids)
        for _ in range(config.max_new_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_the_loss_is_the_answers_likelihood(setup: Setup) -> None:
    """Nats of each problem in a batch are the sum of -log p over its answer's tokens alone, end of
    text included.
    """
    config, model, tokenizer, problems = setup
    scores = score(model, tokenizer, config, problems, "test", Accelerator())
    for problem, (nats, tokens) in zip(problems, scores, strict=True):
        ids, start = encode(tokenizer, config.prompt, problem)
        with torch.no_grad():
            log_p = functional.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
        expected = -sum(
            log_p[position - 1, ids[position]].item() for position in range(start, len(ids))
        )
        assert tokens == len(ids) - start
        assert nats == pytest.approx(expected, rel=1e-5)


def test_outcomes_belong_to_their_problems(setup: Setup) -> None:
    """Sorting by length for speed does not mix up questions: outcomes come in the order of the
    problems.
    """
    config, model, tokenizer, problems = setup
    outcomes = evaluate(model, tokenizer, config, problems, "test", Accelerator())
    assert [outcome.question for outcome in outcomes] == [problem.question for problem in problems]
    alone = evaluate(model, tokenizer, config, problems[3:4], "test", Accelerator())[0]
    assert outcomes[3].prediction == alone.prediction
    assert outcomes[3].nats == pytest.approx(alone.nats, rel=1e-5)
    assert not model.training
