"""Pretraining of the embedded models: it can be killed at any moment."""

from pathlib import Path
from random import Random

import pytest
import torch
from lora_lite_benchmark import pretraining
from lora_lite_benchmark.pretraining import Pretraining, train_model
from lora_lite_benchmark.skill import MODEL_DIR
from lora_lite_benchmark.skill.problems import problem_at_home
from transformers import AutoTokenizer

STEPS = 5


def test_a_killed_pretraining_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on from its last checkpoint, with the optimizer and the rate that it had there."""
    monkeypatch.setattr(pretraining, "CHECKPOINT_EVERY", 2)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    plan = Pretraining(problem_at_home, batch_size=2, steps=STEPS)
    whole = train_model(plan, tokenizer, STEPS, tmp_path / "whole.pt")

    made = 0

    def killed_in_the_fourth_step(random: Random) -> tuple[str, str]:
        nonlocal made
        made += 1
        if made > 3 * plan.batch_size:
            raise KeyboardInterrupt
        return problem_at_home(random)

    dying = Pretraining(killed_in_the_fourth_step, batch_size=2, steps=STEPS)
    with pytest.raises(KeyboardInterrupt):
        train_model(dying, tokenizer, STEPS, tmp_path / "killed.pt")
    assert torch.load(tmp_path / "killed.pt")["step"] == 2
    resumed = train_model(plan, tokenizer, STEPS, tmp_path / "killed.pt")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name
