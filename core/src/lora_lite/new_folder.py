"""A folder that appears when it is whole: filled under another name, and renamed."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lora_lite.errors import AdapterFileError


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """The folder to fill. After an error, at a full disk for instance, there is none.

    Raises:
        AdapterFileError: there is something at the path already; or it cannot be written.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise AdapterFileError(
            f"{path} is there already",
            expected="A whole checkpoint goes into a folder of its own",
            fix="Choose another path",
            path=str(path),
        )
    unfinished = path.parent / f".{path.name}-{secrets.token_hex(4)}.tmp"
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        if path.is_dir():
            path.rmdir()
        unfinished.rename(path)
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterFileError(f"{path} cannot be written: {reason}", path=str(path)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone already if all went well
