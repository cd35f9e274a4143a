"""Which checkpoints of a Trainer are whole.

A process that is killed while it saves leaves a folder that looks like a checkpoint. The Trainer
would resume from it with a new optimizer, at step 0, and say nothing.
"""

import json
from pathlib import Path

from lora_lite import AdapterError
from lora_lite.training import CONTENTS

# The Trainer's file; FSDP's file or folder; what DeepSpeed writes last.
OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_0", "latest")
SCHEDULER = "scheduler.pt"
STATE = "trainer_state.json"  # the last file to be written


def refuse_incomplete(checkpoint: str | Path) -> None:
    """An error for a checkpoint from which training could not go on exactly.

    Raises:
        AdapterError: it names what is missing.
    """
    missing = _missing(Path(checkpoint))
    if missing:
        raise AdapterError(
            f"{checkpoint} is not a whole checkpoint",
            details=missing,
            expected="Saving it was interrupted, or it was saved with save_only_model",
            fix="Resume from an earlier one; or start anew from its adapters, with "
            "lora_lite.restore_all(model, checkpoint) before train()",
        )


def last_complete(folder: str | Path) -> str | None:
    """The last whole checkpoint in a folder, or None.

    Args:
        folder: the trainer's output_dir.
    """
    if not Path(folder).is_dir():
        return None
    checkpoints = [path for path in Path(folder).glob("checkpoint-*") if _step(path) is not None]
    for checkpoint in sorted(checkpoints, key=lambda path: _step(path) or 0, reverse=True):
        if not _missing(checkpoint):
            return str(checkpoint)
    return None


def _step(checkpoint: Path) -> int | None:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else None


def _missing(checkpoint: Path) -> list[str]:
    """What a checkpoint lacks, one line for each."""
    missing = [
        f"{name} is missing" for name in (CONTENTS, SCHEDULER) if not (checkpoint / name).is_file()
    ]
    if not any((checkpoint / name).exists() for name in OPTIMIZER):
        missing.append("the optimizer's state is missing")
    if not _is_readable(checkpoint / STATE):
        missing.append(f"{STATE} is missing or not complete")
    return missing


def _is_readable(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
