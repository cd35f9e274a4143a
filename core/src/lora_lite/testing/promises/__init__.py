"""The promises, by subject."""

from lora_lite.testing.promise import PROMISES
from lora_lite.testing.promises import (
    base,
    calibration,
    fields,
    files,
    forward,
    start,
    switches,
    training,
    wrappers,
)

__all__ = [
    "PROMISES",
    "base",
    "calibration",
    "fields",
    "files",
    "forward",
    "start",
    "switches",
    "training",
    "wrappers",
]
