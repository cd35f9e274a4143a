"""The one error that the benchmark itself raises."""

from lora_lite import LoraLiteError

__all__ = ["BenchmarkError"]


class BenchmarkError(LoraLiteError):
    """A run cannot be planned, done or trusted.

    `problem` says what happened, `expected` what would have been right, `fix` what to do. The
    command prints them without a traceback.
    """
