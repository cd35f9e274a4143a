"""The one error that a user's mistake raises: its text says what was given, what was expected, and the way out."""

__all__ = ["BenchmarkError"]


class BenchmarkError(Exception):
    """Shown by the command as one line, without a traceback."""
