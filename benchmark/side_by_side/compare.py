"""The same training by PEFT and by lora-lite: what it takes, leaves on the disk, and resumes to.

    python benchmark/side_by_side/compare.py MODEL DATA [--out DIR]

MODEL is a folder of transformers, and DATA a file in the format of GSM8K. TRL trains both, each in
a process of its own: once in one go, and once from the checkpoint at half. Printed are

    lines changed       in the script, against the one that trains the whole model
    checkpoint kB       all files of the last checkpoint, and the adapter's among them
    resumed             whether the losses and the weights of the resumed run are the same bits
    peak MB             resident memory of the process, less that of one that only loads the model
    messages            lines on standard error that the script for the whole model does not print
    losses              of the first and the last step
"""

import argparse
import difflib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import STEPS
from safetensors.torch import load_file

HERE = Path(__file__).parent
METHODS = {"sft": "SFT", "dpo": "DPO"}
SIDES = {"peft": "PEFT", "lora_lite": "lora-lite"}
ADAPTER = {"peft": "adapter_model.safetensors", "lora_lite": "default.adapter.safetensors"}
COLUMNS = ["TRL", "by", "lines changed", "checkpoint kB", "adapter kB"]
COLUMNS += ["resumed losses, weights", "peak MB", "messages", "losses"]
ONLY_LOADED = "from common import Task; import trl; Task.of_command_line().model()"


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its peak of resident memory, and its lines on standard error."""

    peak_bytes: int
    messages: list[str]


@dataclass(frozen=True)
class Row:
    """What is said of one method by one side."""

    method: str
    side: str
    lines_changed: int
    checkpoint_bytes: int
    adapter_bytes: int
    same_losses: bool
    same_weights: bool
    peak_bytes: int
    messages: list[str]
    losses: tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, help="keep the runs here (default: they are removed)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        told = [str(options.model.resolve()), str(options.data.resolve())]
        loaded = run(["-c", ONLY_LOADED, *told, str(out)]).peak_bytes
        rows = [row for method in METHODS for row in compared(method, told, out, loaded)]
    print(table(rows))
    for row in rows:
        for message in row.messages:
            print(f"{METHODS[row.method]}, {SIDES[row.side]}: {message}")


def compared(method: str, told: list[str], out: Path, loaded: int) -> list[Row]:
    """The rows of one method."""
    plain = out / f"{method}-plain"
    usual = set(run([str(HERE / f"{method}_plain.py"), *told, str(plain)]).messages)
    shutil.rmtree(plain)
    return [measured(method, side, told, out, loaded, usual) for side in SIDES]


def measured(
    method: str, side: str, told: list[str], out: Path, loaded: int, usual: set[str]
) -> Row:
    script = HERE / f"{method}_{side}.py"
    whole, resumed = out / f"{method}-{side}", out / f"{method}-{side}-resumed"
    ended = run([str(script), *told, str(whole)])
    half = f"checkpoint-{STEPS // 2}"
    shutil.copytree(whole / half, resumed / half)
    run([str(script), *told, str(resumed), "resume"])
    last = whole / f"checkpoint-{STEPS}"
    return Row(
        method=method,
        side=side,
        lines_changed=lines_changed(HERE / f"{method}_plain.py", script),
        checkpoint_bytes=sum(file.stat().st_size for file in last.rglob("*") if file.is_file()),
        adapter_bytes=(last / ADAPTER[side]).stat().st_size,
        same_losses=losses(resumed) == losses(whole),
        same_weights=same(weights(whole, side), weights(resumed, side)),
        peak_bytes=ended.peak_bytes - loaded,
        messages=sorted(set(ended.messages) - usual),
        losses=(losses(whole)[0], losses(whole)[-1]),
    )


def run(command: list[str]) -> Ended:
    """Run Python on a script, and wait for its end; an error ends this program too."""
    environment = {**os.environ, "PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=errors, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        printed = errors.read().splitlines()
    # Progress bars, and the lines of code below a warning, are no messages.
    messages = [line for line in printed if line.strip() and line[0] != " " and "%|" not in line]
    if process.returncode:
        sys.exit("\n".join(printed))
    # macOS counts in bytes, other systems in kB.
    return Ended(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), messages)


def lines_changed(plain: Path, script: Path) -> int:
    """Lines that were added or replaced, the docstring apart."""
    before, after = (file.read_text().splitlines()[1:] for file in (plain, script))
    return sum(line.startswith("+ ") for line in difflib.ndiff(before, after))


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def weights(folder: Path, side: str) -> dict[str, Any]:
    return load_file(folder / "final" / ADAPTER[side])


def same(some: dict[str, Any], others: dict[str, Any]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[k], others[k]) for k in some)


def table(rows: list[Row]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for row in rows:
        bits = ", ".join(
            "same" if same else "other" for same in (row.same_losses, row.same_weights)
        )
        cells = [
            METHODS[row.method],
            SIDES[row.side],
            str(row.lines_changed),
            f"{row.checkpoint_bytes / 1000:,.0f}",
            f"{row.adapter_bytes / 1000:,.0f}",
            bits,
            f"{row.peak_bytes / 1e6:,.0f}",
            str(len(row.messages)),
            f"{row.losses[0]:.4f} … {row.losses[1]:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
