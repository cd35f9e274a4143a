"""One row of the table, from its config to its result; and many rows, of which one may fail."""

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import lora_lite as ll
import torch
from accelerate import PartialState
from torch import Tensor
from tqdm import tqdm

from lora_lite_benchmark.config import SPECIAL_ROWS, RunConfig
from lora_lite_benchmark.data import Batch, Example, collate, load_problems, training_examples
from lora_lite_benchmark.errors import BenchmarkError
from lora_lite_benchmark.evaluate import evaluate
from lora_lite_benchmark.files import write_text
from lora_lite_benchmark.measure import (
    TimedPass,
    peak_memory,
    reset_peak_memory,
    synchronize,
    time_step,
)
from lora_lite_benchmark.models import load_model, load_tokenizer
from lora_lite_benchmark.processes import is_main_process, on_main, same_start, share
from lora_lite_benchmark.results import FILE as RESULT_FILE
from lora_lite_benchmark.results import Measurements, Result, Split, machine, versions
from lora_lite_benchmark.train import batch_rows, epoch_order, train
from lora_lite_benchmark.variants import AnyAdapter, attach_adapter, distribution
from lora_lite_benchmark.verify import check_macs, logits, reload_agrees

__all__ = ["ADAPTER_FILE", "run_all", "run_one"]

ADAPTER_FILE = "adapter.safetensors"
CHECKPOINT_FILE = "checkpoint.pt"
ERROR_FILE = "error.txt"
VERIFIED_ROWS = 4
QUANTIZING = ("bitsandbytes", "lora-lite-bitsandbytes")


def run_one(config: RunConfig, out: Path) -> Result:
    """Train, test, save, and prove the saved file. A complete run is read, not repeated; a killed one goes on.

    Every process of a launch calls this, and gets the result.
    """
    folder = out / config.folder
    accelerator = share(config.batch_size)
    if (done := on_main(accelerator, lambda: Result.load(folder))) is not None:
        return done

    tokenizer = load_tokenizer(config)
    pad: int = tokenizer.pad_token_id
    examples, skipped = training_examples(tokenizer, config)
    batch = collate((examples[row] for row in batch_rows(0, len(examples), config)), pad)
    batch = batch.to(accelerator.device)
    trains = config.variant != "base"

    model = load_model(config, accelerator.device)
    started = time.perf_counter()
    calibration = TimedPass(_calibration(examples, config, pad), accelerator.device)
    adapter = attach_adapter(model, config, calibration)
    synchronize(accelerator.device)
    init_s = time.perf_counter() - started - (calibration.seconds or 0.0)
    same_start(adapter, accelerator)
    check_macs(model, adapter, batch)
    if config.perturb and config.variant not in SPECIAL_ROWS:
        ll.check(model, {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask})
        _perturb(adapter, config)

    reset_peak_memory(accelerator.device)
    started = time.perf_counter()
    curve = (
        train(model, adapter, examples, config, accelerator, pad, folder / CHECKPOINT_FILE)
        if trains
        else []
    )
    train_s = time.perf_counter() - started
    forward_ms, backward_ms = time_step(model, batch, backward=trains)
    memory, memory_of = peak_memory(accelerator.device)

    with adapter.frozen():
        splits = {
            name: Split(
                outcomes=tuple(
                    evaluate(
                        model,
                        tokenizer,
                        config,
                        load_problems(source),
                        f"{config.label}: {name}",
                        accelerator,
                    )
                )
            )
            for name, source in (("validation", config.validation), ("test", config.test))
            if source is not None
        }

    def finish() -> Result:
        """Files, and what is known of them."""
        if trains:
            adapter.save(folder / ADAPTER_FILE)
            sample = Batch(*(tensor[:VERIFIED_ROWS] for tensor in batch))
            reload_agrees(config, folder / ADAPTER_FILE, sample, logits(model, sample))
        result = Result(
            hash=config.hash,
            config=config,
            versions=versions(
                [
                    *distribution(config.variant),
                    *([] if config.quantization == "none" else QUANTIZING),
                ]
            ),
            machine=machine(accelerator.device) | {"processes": accelerator.num_processes},
            skipped_rows=skipped,
            measurements=Measurements(
                parameters=adapter.num_parameters,
                macs_per_token=adapter.macs_per_token,
                macs_per_forward=adapter.macs_per_forward,
                forward_ms=forward_ms,
                backward_ms=backward_ms if trains else None,
                calibration_s=calibration.seconds,
                init_s=init_s if trains else None,
                train_s=train_s if trains else None,
                peak_memory_bytes=memory,
                peak_memory_of=memory_of,
                file_bytes=(folder / ADAPTER_FILE).stat().st_size if trains else None,
                slim_file_bytes=None
                if config.variant in SPECIAL_ROWS
                else _slim_size(adapter, folder),
            ),
            reloaded_identical=True if trains else None,
            test=splits.get("test"),
            validation=splits.get("validation"),
            curve=tuple(curve),
        )
        result.save(folder)
        for leftover in (
            folder / CHECKPOINT_FILE,
            folder / ERROR_FILE,
            *folder.glob(".*"),
        ):  # hidden: half-written at a kill
            leftover.unlink(missing_ok=True)
        return result

    return on_main(accelerator, finish)


def run_all(
    configs: Sequence[RunConfig], out: Path, report: Callable[[RunConfig, Result | Exception], None]
) -> tuple[list[Result], int]:
    """Run every config and `report` each outcome; one that fails does not stop the others.

    Returns the results and the number of failures. A failure's traceback is in `error.txt` in the run's folder. Of several
    processes, only the main one reports and writes. There, an error that may be one process's alone (memory, say) is raised:
    the others wait for it, and only the launcher can end them.
    """
    results: list[Result] = []
    clock = Clock(
        [config for config in configs if not (out / config.folder / RESULT_FILE).exists()]
    )
    for number, config in enumerate(configs, start=1):
        if is_main_process():
            clock.announce(config, f"row {number} of {len(configs)}")
        try:
            results.append(run_one(config, out))
            if is_main_process():
                report(config, results[-1])
        except Exception as error:
            if is_main_process():
                write_text(out / config.folder / ERROR_FILE, traceback.format_exc())
                report(config, error)
            if PartialState().num_processes > 1 and not isinstance(
                error, (BenchmarkError, ll.LoraLiteError)
            ):
                raise
        clock.passed(config)
    return results, len(configs) - len(results)


class Clock:
    """How long the rows that are still to be run will take, by those that were."""

    def __init__(self, to_run: Sequence[RunConfig]) -> None:
        self.to_run = {config.hash for config in to_run}
        self.started, self.done = time.monotonic(), 0

    def announce(self, config: RunConfig, which: str) -> None:
        """Say on standard error which row begins, and how much time is left."""
        if config.hash not in self.to_run:
            return
        left = (
            (time.monotonic() - self.started) / self.done * len(self.to_run) if self.done else None
        )
        about = "" if left is None else f", about {max(1, round(left / 60))} min left"
        tqdm.write(f"{config.label} (seed {config.seed}): {which}{about}", file=sys.stderr)

    def passed(self, config: RunConfig) -> None:
        """Take note that `config` is through, however it ended."""
        if config.hash in self.to_run:
            self.to_run.remove(config.hash)
            self.done += 1


def _calibration(
    examples: list[Example], config: RunConfig, pad: int
) -> Iterator[dict[str, Tensor]]:
    """Batches of training rows, as keyword arguments of the model."""
    rows = [
        examples[row]
        for row in epoch_order(len(examples), config.seed, 0)[: config.calibration_rows]
    ]
    for start in range(0, len(rows), config.batch_size):
        batch = collate(rows[start : start + config.batch_size], pad)
        yield {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


@torch.no_grad()
def _perturb(adapter: AnyAdapter, config: RunConfig) -> None:
    """Noise on every trainable tensor, the same for the same seed."""
    generator = torch.Generator().manual_seed(config.seed)
    for _, parameter in adapter.named_parameters():
        parameter.add_(
            config.perturb * torch.randn(parameter.shape, generator=generator).to(parameter)
        )


def _slim_size(adapter: AnyAdapter, folder: Path) -> int | None:
    """Bytes of the file without derived tensors; None where it has none to leave out."""
    path = folder / f".slim-{ADAPTER_FILE}"
    try:
        adapter.save(path, derived=False)
        return path.stat().st_size
    except ll.LoraLiteError:  # calibration data shaped what would have to be derived again
        return None
    finally:
        path.unlink(missing_ok=True)
