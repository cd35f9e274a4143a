"""Chooses the learning rates of the preset `skill`: three trials for every row.

    python benchmark/perf/skill_rates.py --out DIR [--rows ROW ...]

Every row is trained at a rate that is likely to suit it, at a third of it and at three times of it,
and judged by its loss on 200 validation problems. The test problems decide nothing. A run that is
complete is not repeated, so the command can be killed and started again. What it prints goes into
the preset by hand.
"""

import argparse
from pathlib import Path

from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.preset import Preset, resolve
from lora_lite_benchmark.results import Result
from lora_lite_benchmark.series import run_all

LIKELY = {
    "lora": 0.01,
    "antipasto": 0.1,
    "full": 0.0003,
    "road": 0.03,
    "ia3_ff": 0.1,
    "antipasto_gain": 0.1,
    "lora:r=1": 0.03,
    "lora:r=4": 0.01,
    "lora:r=32": 0.003,
    "ia3": 0.1,
    "lora_xs": 0.1,
    "antipasto_mix": 0.1,
    "antipasto_ablate": 0.1,
    "pissa": 0.01,
    "dora": 0.01,
    "hra": 0.1,
    "delora": 0.1,
    "eva": 0.01,
    "oft": 0.01,
    "loha": 0.01,
    "lokr": 0.01,
    "hira": 0.01,
    "miss": 0.01,
    "c3a": 0.3,
    "shira": 0.003,
    "fourierft": 0.3,
    "olora": 0.01,
    "milora": 0.01,
    "corda": 0.01,
    "lora_ga": 0.01,
    "vera": 0.1,
    "vb_lora": 0.1,
    "randlora": 0.01,
}
"""The middle of the three rates of every row."""

LADDER = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

VALIDATION = {"path": "skill", "split": "validation", "count": 200}


def trials(row: str) -> list[RunConfig]:
    """The configs of a row at its three rates."""
    middle = LADDER.index(LIKELY[row])
    preset = Preset.load("skill")
    return [
        resolve(preset, row, lr=rate, validation=VALIDATION, test=None)
        for rate in LADDER[middle - 1 : middle + 2]
    ]


def print_outcome(config: RunConfig, outcome: Result | Exception) -> None:
    """One line about a trial."""
    name = f"{config.label:18} {config.lr:<6g}"
    if isinstance(outcome, Exception):
        print(f"{name} failed: {outcome}", flush=True)
        return
    split = outcome.judged
    print(f"{name} loss {split.loss:.4f}, {100 * split.accuracy:.1f} %", flush=True)


def best(results: list[Result]) -> Result:
    """The trial with the lowest loss on the validation problems."""
    return min(results, key=lambda result: result.judged.loss)


def main() -> None:
    """Run the trials that are not done, then print the best rate of every row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder of the runs")
    parser.add_argument("--rows", nargs="+", choices=LIKELY, default=list(LIKELY), metavar="ROW")
    arguments = parser.parse_args()
    chosen = {}
    for row in arguments.rows:
        results, _ = run_all(trials(row), arguments.out, print_outcome)
        if results:
            chosen[row] = best(results).config.lr
    for row, rate in chosen.items():
        print(f'"{row}": {{"lr": {rate:g}}}')


if __name__ == "__main__":
    main()
