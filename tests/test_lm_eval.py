"""An adapter evaluated by lm-eval: as it is on the model, merged, and as a folder of PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lora_lite as ll
import pytest
import torch
from lora_lite_benchmark.tiny import MODEL_DIR
from transformers import AutoModelForCausalLM, AutoTokenizer

lm_eval = pytest.importorskip(
    "lm_eval", reason="lm-eval is not installed: `make evaluated` does it"
)

TASK = """
task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of lm-eval: sums, and four answers to choose from."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"What is {n} + 5?",
            "choices": [f" {n + k}" for k in range(4, 8)],
            "answer": 1,
        }
        for n in range(12)
    ]
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(TASK.format(data=data))
    return folder


def evaluated(tasks: Path, **model: Any) -> list[list[float]]:
    """The log-likelihood of every answer to every question."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=HFLM(device="cpu", dtype="float32", batch_size=4, **model),
        tasks=["sums"],
        task_manager=TaskManager(include_path=str(tasks)),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["sums"], key=lambda sample: sample["doc_id"])
    return [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("variant", ["lora", "antipasto"])
def test_three_ways_agree(tasks: Path, tmp_path: Path, variant: str) -> None:
    """The model with its adapter, the merged checkpoint and the folder of PEFT get the same
    log-likelihoods, which are not the base's.
    """
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    base = evaluated(tasks, pretrained=model, tokenizer=tokenizer)
    adapter = ll.attach(model, variant, r=8, targets=r"down_proj$")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    with adapter.frozen():
        attached = evaluated(tasks, pretrained=model, tokenizer=tokenizer)
    adapter.save(tmp_path / "merged", format="merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    adapter.save(tmp_path / "peft", format="peft")

    merged = evaluated(tasks, pretrained=str(tmp_path / "merged"))
    peft = evaluated(tasks, pretrained=str(MODEL_DIR), peft=str(tmp_path / "peft"))
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(torch.tensor(merged), torch.tensor(attached), **close)
    torch.testing.assert_close(torch.tensor(peft), torch.tensor(attached), **close)
    assert not torch.allclose(torch.tensor(base), torch.tensor(attached), atol=1e-2)
