"""The promises, by subject."""

from lora_lite.testing.promise import PROMISES
from lora_lite.testing.promises import (
    base,
    calibration,
    costs,
    derived,
    fields,
    files,
    forward,
    gradients,
    kinds,
    numbers,
    purity,
    schedules,
    start,
    switches,
    training,
    wrappers,
)

__all__ = [
    "PROMISES",
    "base",
    "calibration",
    "costs",
    "derived",
    "fields",
    "files",
    "forward",
    "gradients",
    "kinds",
    "numbers",
    "purity",
    "schedules",
    "start",
    "switches",
    "training",
    "wrappers",
]
