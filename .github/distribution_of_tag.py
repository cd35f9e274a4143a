"""Print the folder of the distribution that a tag names, and refuse a tag that does not fit it.

    python .github/distribution_of_tag.py lora-lite-core-v0.1.0
    core

A tag is the distribution's name, `-v`, and the version that its pyproject.toml has.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TAG = re.compile(r"(?P<name>lora-lite-[a-z0-9-]+)-v(?P<version>\d[\w.+]*)")


class TagError(Exception):
    """The tag names no distribution of this repository, or another version of it."""


def distributions(root: Path) -> dict[str, tuple[Path, str]]:
    """The folder and the version of every distribution of the repository, by name."""
    found = {}
    for pattern in ("core", "benchmark", "plugins/*"):
        for project in sorted(root.glob(f"{pattern}/pyproject.toml")):
            text = project.read_text(encoding="utf-8")
            found[field(text, "name")] = (project.parent, field(text, "version"))
    return found


def field(project: str, name: str) -> str:
    """A string of a pyproject.toml that is on a line of its own. (Python 3.10 has no tomllib.)"""
    line = re.search(rf'^{name} = "(.*)"$', project, re.MULTILINE)
    if line is None:
        raise TagError(f'a pyproject.toml has no line {name} = "…"')
    return line[1]


def folder_of(tag: str, root: Path = ROOT) -> Path:
    """The folder to build for a tag.

    Raises:
        TagError: the tag is misspelt, names no distribution, or has not the version of its
            pyproject.toml.
    """
    match = TAG.fullmatch(tag)
    if match is None:
        raise TagError(f"the tag {tag!r} is not of the form lora-lite-core-v0.1.0")
    known = distributions(root)
    if match["name"] not in known:
        names = ", ".join(sorted(known))
        raise TagError(
            f"the tag {tag!r} names no distribution of this repository; there are {names}"
        )
    folder, version = known[match["name"]]
    if version != match["version"]:
        raise TagError(
            f"the tag {tag!r} says version {match['version']}, but the pyproject.toml of "
            f"{match['name']} says {version}; raise the version there first, or correct the tag"
        )
    return folder.relative_to(root)


if __name__ == "__main__":
    try:
        folder = folder_of(sys.argv[1] if len(sys.argv) > 1 else "")
        sys.stdout.write(f"{folder.as_posix()}\n")
    except TagError as error:
        sys.exit(str(error))
