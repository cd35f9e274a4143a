"""How lora-lite warns: by an `AdapterWarning` that points at the user's line."""

import sys
import warnings
from collections.abc import Sequence

from lora_lite.errors import AdapterWarning, bullets


def warn(problem: str, details: Sequence[str] = (), advice: str = "") -> None:
    """Warn of a problem, with a line for each thing that has it, and say what to do."""
    text = f"{problem}:{bullets(details)}\n{advice}" if details else f"{problem}. {advice}"
    warnings.warn(text.rstrip(". \n"), AdapterWarning, stacklevel=_frames_of_ours())


def _frames_of_ours() -> int:
    """How many frames up the first one is that is not of lora-lite."""
    depth = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__package__") == __package__:
        frame = frame.f_back
        depth += 1
    return depth
