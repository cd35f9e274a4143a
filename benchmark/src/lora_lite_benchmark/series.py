"""Many rows, of which one may fail without stopping the others."""

import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import lora_lite as ll
from accelerate import PartialState
from tqdm import tqdm

from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.files import write_text
from lora_lite_benchmark.processes import is_main_process
from lora_lite_benchmark.record import ERROR_FILE
from lora_lite_benchmark.results import FILE as RESULT_FILE
from lora_lite_benchmark.results import Result
from lora_lite_benchmark.run import run_one

__all__ = ["run_all"]

Report = Callable[[RunConfig, Result | Exception], None]


def run_all(configs: Sequence[RunConfig], out: Path, report: Report) -> tuple[list[Result], int]:
    """Run every config, and `report` the outcome of each.

    The traceback of a failure is written to `error.txt` in the run's folder. Of several processes
    only the main one reports and writes.

    Returns the results and the number of failures.

    Raises:
        Exception: with several processes, any error that is not lora-lite's own. It may have
            happened in one process alone, such as running out of memory. The others would wait for
            that process forever, and only the launcher can end them.
    """
    results: list[Result] = []
    clock = Clock([config for config in configs if not _is_complete(config, out)])
    for number, config in enumerate(configs, start=1):
        if is_main_process():
            clock.announce(config, f"row {number} of {len(configs)}")
        try:
            result = run_one(config, out)
        except Exception as error:
            if is_main_process():
                write_text(out / config.folder / ERROR_FILE, traceback.format_exc())
                report(config, error)
            if PartialState().num_processes > 1 and not isinstance(error, ll.LoraLiteError):
                raise
        else:
            results.append(result)
            if is_main_process():
                report(config, result)
        clock.passed(config)
    return results, len(configs) - len(results)


def _is_complete(config: RunConfig, out: Path) -> bool:
    return (out / config.folder / RESULT_FILE).exists()


class Clock:
    """Estimates how long the rows that are left will take, from those that are done."""

    def __init__(self, to_run: Sequence[RunConfig]) -> None:
        self.to_run = {config.hash for config in to_run}
        self.started = time.monotonic()
        self.done = 0

    def announce(self, config: RunConfig, which: str) -> None:
        """Say on standard error which row begins, and how much time is left."""
        if config.hash not in self.to_run:
            return
        line = f"{config.label} (seed {config.seed}): {which}"
        if self.done:
            seconds = (time.monotonic() - self.started) / self.done * len(self.to_run)
            line += f", about {max(1, round(seconds / 60))} min left"
        tqdm.write(line, file=sys.stderr)

    def passed(self, config: RunConfig) -> None:
        """Note that `config` has ended, with a result or with an error."""
        if config.hash in self.to_run:
            self.to_run.remove(config.hash)
            self.done += 1
