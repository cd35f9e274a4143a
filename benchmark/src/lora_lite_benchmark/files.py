"""Writing a file as a whole or not at all, and identifying files by their contents."""

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["model_digest", "sha256", "write_atomically", "write_text"]

MODEL_FILES = {".json", ".safetensors", ".bin", ".txt", ".model", ".jinja"}
"""The suffixes of what `save_pretrained` writes: config, weights, tokenizer."""

READ_AT_ONCE = 1 << 20  # bytes


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that a kill at any moment leaves either the old one or the new one.

    `write` fills a temporary file in the same folder. It is flushed to disk, then renamed to
    `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix
    )
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def model_digest(folder: Path) -> str:
    """The digest of a model directory's files: config, weights and tokenizer."""
    return sha256(*sorted(path for path in folder.iterdir() if path.suffix in MODEL_FILES))


def sha256(*paths: Path) -> str:
    """Hex digest of the contents of one file, or of several in the order given.

    A file is read again only if its size or its time of modification has changed.
    """
    digests = []
    for path in paths:
        status = path.stat()
        digests.append(_sha256(path, status.st_size, status.st_mtime_ns))
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


@functools.lru_cache
def _sha256(path: Path, _size: int, _modified: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_AT_ONCE):
            digest.update(chunk)
    return digest.hexdigest()


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
