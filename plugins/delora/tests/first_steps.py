"""The first steps of DeLoRA from its starts, beside LoRA's: the loss curves of the decision page.

    python plugins/delora/tests/first_steps.py [--steps 11] [--down]

The embedded model and word problems of the benchmark, AdamW at a constant `recommended_lr` without
warm-up, gradients clipped at norm 1, and the same batches for all. Every projection is adapted, or,
with --down, the down projections of two layers.
"""

import argparse

import lora_lite as ll
import torch
from lora_lite_benchmark.config import Preset, resolve
from lora_lite_benchmark.data import Batch, collate, training_examples
from lora_lite_benchmark.evaluate import nats
from lora_lite_benchmark.models import load_model, load_tokenizer
from lora_lite_benchmark.train import batch_rows
from torch import nn

CONFIG = resolve(Preset.load("tiny"), "lora")
ROWS = {
    "lora": {},
    "delora, subtract, channel, 1": {"strength": 1.0},
    "delora, subtract, channel, 8": {"strength": 8.0},
    "delora, subtract, channel, 15": {},
    "delora, subtract, scalar, 8": {"norm": "scalar", "strength": 8.0},
    "delora, zero_b, channel, 1": {"start": "zero_b", "strength": 1.0},
    "delora, zero_b, channel, 15": {"start": "zero_b"},
}
SHOWN = (0, 1, 2, 3, 5, 10, 20, 50, 100)


def batches(steps: int) -> list[Batch]:
    """The same batches for every row."""
    tokenizer = load_tokenizer(CONFIG)
    examples, _ = training_examples(tokenizer, CONFIG)
    order = (batch_rows(step, len(examples), CONFIG) for step in range(steps))
    return [collate((examples[row] for row in rows), tokenizer.pad_token_id or 0) for rows in order]


def curve(label: str, data: list[Batch], down: bool) -> list[float]:
    """The loss at every step, in nats an answer token."""
    model = load_model(CONFIG)
    variant = label.partition(",")[0]
    where = {"targets": CONFIG.targets, "layers": CONFIG.layers} if down else {}
    adapter = ll.attach(model, variant, **where, **ROWS[label])
    lr = adapter.variant.recommended_lr
    optimizer = torch.optim.AdamW(adapter.param_groups(weight_decay=0.01), lr=lr)
    losses = []
    for batch in data:
        loss = nats(model, batch).sum() / (batch.labels >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description="The first steps of DeLoRA, beside LoRA's.")
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--down", action="store_true", help="adapt two down projections only")
    arguments = parser.parse_args()
    data = batches(arguments.steps)
    shown = [step for step in SHOWN if step < arguments.steps]
    print(f"| start | {' | '.join(f'step {step}' for step in shown)} |")
    print("|---" * (1 + len(shown)) + "|")
    for label in ROWS:
        losses = curve(label, data, arguments.down)
        print(f"| {label} | {' | '.join(f'{losses[step]:.3f}' for step in shown)} |", flush=True)


if __name__ == "__main__":
    main()
