"""Adapters on the Hugging Face hub: loaded by their id, and pushed with a card.

    ll.load(model, "user/name")        or "user/name@revision"
    ll.push_to_hub(adapter, "user/name")

What is downloaded is what begins with `adapter`: lora-lite's own `adapter.safetensors`, or the two
files of a folder of PEFT. What is pushed is one commit: the adapter, and a model card where there
is none yet. The package huggingface_hub does both, and knows the user's token; transformers brings
it along, and nothing else here needs it.
"""

import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lora_lite.errors import AdapterError, AdapterFileError
from lora_lite.fileformat import FilePath
from lora_lite.model_card import Results, model_card
from lora_lite.warn import warn

if TYPE_CHECKING:
    from lora_lite.adapter import Adapter

T = TypeVar("T")

OWN_FILE = "adapter.safetensors"
CARD = "README.md"
# `user/name` or `user/name@revision`, by the characters that the hub allows in names.
ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
PACKAGE = "huggingface_hub"


def is_hub_id(path: object) -> bool:
    """Whether text is the id of a repository, and not a path on this machine.

    It is no id if something is there, if its first part is a folder, or if it names a file of
    safetensors: a mistyped path must not become a stranger's adapter.
    """
    if not isinstance(path, str) or not ID.fullmatch(path) or path.endswith(".safetensors"):
        return False
    return not os.path.exists(path) and not os.path.isdir(path.partition("/")[0])


def local_path(path: FilePath) -> FilePath:
    """A path as it is; the id of a repository as the path of what was downloaded.

    Raises:
        AdapterFileError: the id names nothing that can be downloaded, or no adapter.
    """
    if not is_hub_id(path):
        return path
    hub: Any = _package(f"{path} is not a path that is there. As an id on the Hugging Face hub")
    match = ID.fullmatch(str(path))
    assert match is not None
    folder = Path(
        _asked(
            f"{path} is neither a path that is there, nor an adapter on the Hugging Face hub",
            lambda: hub.snapshot_download(match[1], revision=match[2], allow_patterns=["adapter*"]),
        )
    )
    if not any(folder.glob("adapter*")):
        raise AdapterFileError(
            f"{path} on the Hugging Face hub holds no adapter",
            expected=f"It would have {OWN_FILE}, or adapter_config.json and the tensors of PEFT",
            path=str(path),
        )
    own = folder / OWN_FILE
    return own if own.is_file() else folder


def push_to_hub(
    adapter: "Adapter",
    repo_id: str,
    *,
    format: str | None = None,  # noqa: A002 (the word for it)
    private: bool = False,
    results: Results = None,
    **options: Any,
) -> str:
    """Push an adapter to the Hugging Face hub, in one commit, with a model card.

    The repository is made if it is not there. A card that is there already is left as it is.

    Args:
        adapter: to push.
        repo_id: such as "user/name".
        format: None for lora-lite's own file, or as in `Adapter.save`: "peft" for everybody who
            knows PEFT, "merged" for a whole checkpoint.
        private: whether a repository that is made is private.
        results: for the card: `{name: figure}`, or the folder of a run of the benchmark.
        options: of `Adapter.save` or of the format.

    Returns:
        The address of the commit.

    Raises:
        AdapterError, AdapterFileError, PluginError: as `Adapter.save`; or the hub refuses, or is
            not reached. Nothing is pushed then.
    """
    hub: Any = _package("To push to the Hugging Face hub")
    card = model_card(adapter, repo_id, format, results)
    with tempfile.TemporaryDirectory() as work:
        saved = Path(work) / (OWN_FILE if format is None else f"adapter.{format}")
        adapter.save(saved, format=format, **options)
        files = _files(saved)
        return _asked(
            f"adapter {adapter.name!r} was not pushed to {repo_id}",
            lambda: _push(hub, repo_id, private, files, card),
        )


def _files(saved: Path) -> dict[str, Path]:
    """What was saved, by the names in the repository."""
    if saved.is_dir():
        return {file.name: file for file in sorted(saved.iterdir())}
    return {saved.name: saved}


def _push(hub: Any, repo_id: str, private: bool, files: Mapping[str, Path], card: str) -> str:
    api = hub.HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    contents: dict[str, Path | bytes] = dict(files)
    if api.file_exists(repo_id, CARD):
        warn(f"the card of {repo_id} was left as it is", advice="Delete it to have it written anew")
    else:
        contents[CARD] = card.encode()
    operations = [
        hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in contents.items()
    ]
    commit = api.create_commit(repo_id, operations, commit_message="Upload an adapter of lora-lite")
    return str(commit.commit_url)


def _package(purpose: str) -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        if error.name != PACKAGE:
            raise
        raise AdapterFileError(
            f"{purpose}, it needs {PACKAGE}", fix=f"pip install {PACKAGE}"
        ) from None
    return huggingface_hub


def _asked(problem: str, ask: Callable[[], T]) -> T:
    """What the hub answers.

    Its errors have no base of their own: some are those of whatever makes the connection.
    """
    try:
        return ask()
    except (AdapterError, AdapterFileError):
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        login = "Log in with `hf auth login`, or set HF_TOKEN"
        raise AdapterFileError(
            f"{problem}: {_first_line(error)}", fix=login if status in (401, 403) else ""
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
