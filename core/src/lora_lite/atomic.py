"""Writing a file so that it is always whole: the old one or the new one, whatever happens.

1. The bytes are written to a temporary file in the target's folder, under a name that nobody can
   guess, made anew and never opened if it exists.
2. They are flushed to the disk, the file takes the target's permissions, and is renamed over it.
3. The folder is flushed as well, so that the rename outlives a power cut.

A writer that is killed leaves its temporary file behind. It held a lock on it, which the system has
given up, and so the next writer in the folder knows that it can be removed.
"""

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    HAS_LOCKS = False
else:
    HAS_LOCKS = True

# Short, so that a target's name may be as long as the file system allows.
PREFIX, SUFFIX = ".lora-lite-", ".tmp"


def write_atomically(path: str | os.PathLike[str], data: bytes | bytearray) -> None:
    """Write `data` to `path`, all of it or nothing.

    A symbolic link is followed, and an existing file keeps its permissions.

    Raises:
        OSError, ValueError: the path cannot be written; what was there before is untouched.
    """
    target = Path(os.path.realpath(path))
    _remove_strays(target.parent)
    descriptor, temporary = _new_file(target)
    try:
        with os.fdopen(descriptor, "wb") as file:
            _keep_mode(target, temporary)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if HAS_LOCKS:
                os.replace(temporary, target)  # while the lock is held
        if not HAS_LOCKS:
            os.replace(temporary, target)  # Windows renames no open file
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _flush_folder(target.parent)


def _new_file(target: Path) -> tuple[int, Path]:
    """A new, locked, empty file beside the target: its descriptor and its path."""
    while True:
        temporary = target.parent / f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}"
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, _mode(target))
        _lock(descriptor)
        if temporary.exists():
            return descriptor, temporary
        os.close(descriptor)  # another writer took it for a stray one before it was locked


def _mode(target: Path) -> int:
    """The permissions of the file that is there, or of a new one before the process's mask."""
    try:
        return stat.S_IMODE(target.stat().st_mode)
    except OSError:
        return 0o666


def _keep_mode(target: Path, temporary: Path) -> None:
    """Give the temporary file the permissions of the target, which the mask may have narrowed."""
    if target.exists():
        os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))


def _flush_folder(folder: Path) -> None:
    """Not every system can open a folder; those that cannot do not need it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_strays(folder: Path) -> None:
    """Remove the temporary files of writers that are no longer there."""
    if not HAS_LOCKS:
        return
    with suppress(OSError):
        for entry in os.scandir(folder):
            if entry.name.startswith(PREFIX) and entry.name.endswith(SUFFIX):
                _remove_if_unlocked(entry.path)


def _remove_if_unlocked(path: str) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Hold the file for as long as it is open. Some network file systems know no locks."""
    if HAS_LOCKS:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
