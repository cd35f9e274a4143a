"""The training loop: what every row of the table went through.

AdamW on the adapter's parameters, linear warm-up, then cosine decay to zero, clipped gradients, and
the mean loss over the answer tokens of the whole batch.

The order of the data and the learning rate are functions of the step. A checkpoint therefore holds
only the parameters, the optimizer, the random states and the curve so far. A run that was killed
goes on from it and ends with the same bits. Several processes share the rows of every batch and
learn what one process learns.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from lora_lite.layers import overwrite, whole
from torch import nn
from tqdm import tqdm

from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.data import Example, collate
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.evaluate import nats
from lora_lite_benchmark.files import write_atomically
from lora_lite_benchmark.processes import is_sharded, on_main, sum_gradients
from lora_lite_benchmark.results import Point
from lora_lite_benchmark.sharded import sharded_state, whole_state
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
    """Train for `config.steps` steps, or for those left if `checkpoint` is there.

    Returns the training curve, with one point for each step. `model` is in eval mode afterwards.

    Raises:
        BenchmarkError: the loss is no longer finite, or the checkpoint was written by another
            number of processes.
    """
    # Every process draws its own dropout.
    torch.manual_seed(config.seed + (accelerator.process_index << 32))
    groups = adapter.param_groups(weight_decay=config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr)
    adapter.project_after(optimizer)
    curve = _resume(checkpoint, adapter, optimizer, accelerator)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    model.train()
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
        norm = float(whole(nn.utils.clip_grad_norm_(parameters, config.clip_norm)))
        _check_finite(loss, norm, step, config)
        optimizer.step()
        optimizer.zero_grad()

        curve.append(Point(step=step, loss=loss, lr=lr, grad_norm=norm))
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
    """Add this process's share of the batch's gradient to the parameters, and return its loss.

    The shares of all processes add up to the loss of the whole batch and to one penalty.

    If the model is in shards, every process takes part in every forward: one that has no row left
    takes the first one, with a weight of zero. Gradients that come through the model are the mean
    over the processes. Those of the penalty do not, and every process has all of it.
    """
    sharded = is_sharded(accelerator)
    processes = accelerator.num_processes
    own = batch[accelerator.process_index :: processes]
    most = math.ceil(len(batch) / processes)
    size = config.micro_batch_size or most
    starts = range(0, most if sharded else len(own), size)
    tokens = sum(len(example.ids) - example.start for example in batch)
    total = 0.0
    for start in starts:
        part = own[start : start + size]
        rows = collate(part or batch[:1], pad).to(accelerator.device)
        loss = nats(model, rows).sum() / tokens * bool(part)
        if sharded:
            torch.autograd.backward(loss * processes + adapter.penalty() / len(starts))
        else:
            torch.autograd.backward(loss + adapter.penalty() * len(part) / len(batch))
        total += loss.item()
    return total


def _check_finite(loss: float, norm: float, step: int, config: RunConfig) -> None:
    if math.isfinite(loss) and math.isfinite(norm):
        return
    raise BenchmarkError(
        f"the loss is {loss} and the norm of the gradient {norm} at step {step}",
        expected="Both must be finite numbers",
        fix=f"Try a smaller lr than {config.lr}",
    )


def learning_rate(step: int, config: RunConfig) -> float:
    """The rate of a step: a line up to `lr` over the warm-up, then half a cosine down to zero."""
    rising = round(config.warmup * config.steps)
    if step < rising:
        return config.lr * (step + 1) / rising
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / (config.steps - rising)))


def batch_rows(step: int, rows: int, config: RunConfig) -> list[int]:
    """The rows that a step trains on. Every epoch takes all rows, in an order of its own."""
    positions = range(step * config.batch_size, (step + 1) * config.batch_size)
    epochs = {position // rows for position in positions}
    orders = {epoch: epoch_order(rows, config.seed, epoch) for epoch in epochs}
    return [orders[position // rows][position % rows] for position in positions]


def epoch_order(rows: int, seed: int, epoch: int) -> list[int]:
    """All rows in the order in which an epoch takes them, which follows from seed and epoch."""
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
    """Write the checkpoint. All processes call this, and the main one writes."""
    random_states = gather_object([_random_state(accelerator)])
    if not accelerator.is_main_process and not is_sharded(accelerator):
        return
    state = {
        "parameters": {
            name: whole(parameter.detach()).cpu() for name, parameter in adapter.named_parameters()
        },
        "optimizer": whole_state(optimizer),
        "random": random_states,
        "curve": [point.model_dump() for point in curve],
    }
    if accelerator.is_main_process:
        write_atomically(checkpoint, lambda path: torch.save(state, path))


def _resume(
    checkpoint: Path,
    adapter: AnyAdapter,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> list[Point]:
    """Restore what `_save` wrote. Returns the curve so far, which is empty without a checkpoint."""

    def read() -> Any:
        if not checkpoint.exists():
            return None
        return torch.load(checkpoint, weights_only=True, map_location="cpu")

    state = on_main(accelerator, read)
    if state is None:
        return []
    processes = len(state["random"])
    if processes != accelerator.num_processes:
        raise BenchmarkError(
            f"{checkpoint} was written by {processes} processes, and this run has "
            f"{accelerator.num_processes}",
            fix=f"Start {processes} processes, or delete the file to train from the beginning",
        )
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            overwrite(parameter, state["parameters"][name])
    optimizer.load_state_dict(sharded_state(state["optimizer"], optimizer))
    random_state = state["random"][accelerator.process_index]
    torch.set_rng_state(random_state["cpu"])
    if "cuda" in random_state:
        torch.cuda.set_rng_state(random_state["cuda"], accelerator.device)
    return [Point(**point) for point in state["curve"]]


def _random_state(accelerator: Accelerator) -> dict[str, Any]:
    """The state of the generators of this process."""
    state = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return state
