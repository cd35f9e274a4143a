"""The training loop: what every row of the table went through.

AdamW on the adapter's parameters, linear warm-up then cosine decay to zero, clipped gradients, the mean loss over the
answer tokens of the whole batch. The order of the data and the learning rate are functions of the step, so a checkpoint
is parameters, optimizer, and random states: a run that was killed goes on from it and ends in the same bits. Several
processes take turns in the rows of every batch, and follow one process.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.data import Example, collate
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.evaluate import nats
from lora_lite_benchmark.files import write_atomically
from lora_lite_benchmark.processes import on_main, sum_gradients
from lora_lite_benchmark.results import Point
from lora_lite_benchmark.variants import AnyAdapter

__all__ = ["batch_rows", "epoch_order", "learning_rate", "train"]


def train(
    model: nn.Module,
    adapter: AnyAdapter,
    examples: Sequence[Example],
    config: RunConfig,
    accelerator: Accelerator,
    pad: int,
    checkpoint: Path,
) -> list[Point]:
    """Train for `config.steps` steps, from `checkpoint` if that file is there; return the training curve.

    Raises BenchmarkError if the loss is no longer finite, or the checkpoint is of another number of processes.
    """
    torch.manual_seed(config.seed + (accelerator.process_index << 32))
    optimizer = torch.optim.AdamW(
        adapter.param_groups(weight_decay=config.weight_decay), lr=config.lr
    )
    adapter.project_after(optimizer)
    curve = _resume(checkpoint, adapter, optimizer, accelerator)
    model.train()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    progress = tqdm(
        range(len(curve), config.steps),
        desc=f"{config.label}: train",
        initial=len(curve),
        total=config.steps,
        disable=not accelerator.is_main_process,
    )
    for step in progress:
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = [examples[row] for row in batch_rows(step, len(examples), config)]
        own_loss = _backward(model, adapter, batch, config, accelerator, pad)
        loss = sum_gradients(own_loss, parameters, accelerator)
        norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        if not math.isfinite(loss) or not math.isfinite(float(norm)):
            raise BenchmarkError(
                f"the loss is {loss} and the gradient norm {norm} at step {step}; try a smaller lr than {config.lr}"
            )
        optimizer.step()
        optimizer.zero_grad()
        curve.append(Point(step=step, loss=loss, lr=lr, grad_norm=float(norm)))
        progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if len(curve) % config.checkpoint_every == 0 or len(curve) == config.steps:
            _save(checkpoint, adapter, optimizer, curve, accelerator)
    model.eval()
    return curve


def _backward(
    model: nn.Module,
    adapter: AnyAdapter,
    batch: list[Example],
    config: RunConfig,
    accelerator: Accelerator,
    pad: int,
) -> float:
    """Gradients of this process's share of the batch's mean loss, in nats a token, whatever the number of forwards it takes;
    return that share. The shares of all processes add up to the loss of the whole batch, and to one penalty.
    """
    own = batch[accelerator.process_index :: accelerator.num_processes]
    size = config.micro_batch_size or len(own)
    tokens = sum(len(example.ids) - example.start for example in batch)
    total = 0.0
    for start in range(0, len(own), size):
        part = own[start : start + size]
        loss = nats(model, collate(part, pad).to(accelerator.device)).sum() / tokens
        (loss + adapter.penalty() * len(part) / len(batch)).backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def learning_rate(step: int, config: RunConfig) -> float:
    """Linear warm-up over the first `warmup` of the steps, then half a cosine from `lr` to zero at `steps`."""
    rising = round(config.warmup * config.steps)
    if step < rising:
        return config.lr * (step + 1) / rising
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / (config.steps - rising)))


def batch_rows(step: int, rows: int, config: RunConfig) -> list[int]:
    """The rows that a step trains on: the data is shuffled anew each epoch, by seed and epoch alone."""
    positions = range(step * config.batch_size, (step + 1) * config.batch_size)
    orders = {
        epoch: epoch_order(rows, config.seed, epoch)
        for epoch in {position // rows for position in positions}
    }
    return [orders[position // rows][position % rows] for position in positions]


def epoch_order(rows: int, seed: int, epoch: int) -> list[int]:
    """All rows, in the order in which an epoch takes them."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order: list[int] = torch.randperm(rows, generator=generator).tolist()
    return order


def _save(
    checkpoint: Path,
    adapter: AnyAdapter,
    optimizer: torch.optim.Optimizer,
    curve: list[Point],
    accelerator: Accelerator,
) -> None:
    random = gather_object([_random_state(accelerator)])
    if accelerator.is_main_process:
        state = {
            "parameters": {
                name: parameter.detach().cpu() for name, parameter in adapter.named_parameters()
            },
            "optimizer": optimizer.state_dict(),
            "random": random,
            "curve": [point.model_dump() for point in curve],
        }
        write_atomically(checkpoint, lambda path: torch.save(state, path))


def _resume(
    checkpoint: Path,
    adapter: AnyAdapter,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> list[Point]:
    """Put everything back as it was at `checkpoint`; return the curve so far, empty without a checkpoint."""
    state = on_main(
        accelerator,
        lambda: (
            torch.load(checkpoint, weights_only=True, map_location="cpu")
            if checkpoint.exists()
            else None
        ),
    )
    if state is None:
        return []
    if len(state["random"]) != accelerator.num_processes:
        raise BenchmarkError(
            f"{checkpoint} is of {len(state['random'])} processes, these are {accelerator.num_processes}: start as many, or "
            "delete it to begin again"
        )
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.copy_(state["parameters"][name])
    optimizer.load_state_dict(state["optimizer"])
    random = state["random"][accelerator.process_index]
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], accelerator.device)
    return [Point(**point) for point in state["curve"]]


def _random_state(accelerator: Accelerator) -> dict[str, Any]:
    """Of this process: it draws its own dropout."""
    state = {"cpu": torch.get_rng_state()}
    return (
        state | {"cuda": torch.cuda.get_rng_state(accelerator.device)}
        if accelerator.device.type == "cuda"
        else state
    )
