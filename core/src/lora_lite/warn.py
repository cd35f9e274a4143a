"""How lora-lite warns: by an `AdapterWarning` that points at the user's line."""

import sys
import warnings
from collections.abc import Sequence

from lora_lite.errors import AdapterWarning, bullets


def warn(problem: str, details: Sequence[str] = (), advice: str = "") -> None:
    """Warn of a problem, with a line for each thing that has it, and say what to do."""
    text = f"{problem}:{bullets(details)}\n{advice}" if details else f"{problem}. {advice}"
    warnings.warn(f"lora-lite: {text}".rstrip(". \n"), AdapterWarning, stacklevel=_frames_of_ours())


def _frames_of_ours() -> int:
    """How many frames up the first one is that is neither of lora-lite nor of torch."""
    depth = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
        depth += 1
    return depth


def _is_inside(module: str) -> bool:
    return module.partition(".")[0] in ("lora_lite", "torch")
