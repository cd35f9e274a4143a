"""`lora-lite new`: a package to begin a variant with: the folder `template/`, with other names."""

import re
from importlib import metadata
from keyword import iskeyword
from pathlib import Path
from tempfile import TemporaryDirectory

from lora_lite.errors import LoraLiteError
from lora_lite.plugins import first_party, variants

TEMPLATE = Path(__file__).parent / "template"
NAME = re.compile(r"(?!lora[-_]lite)[a-z][a-z0-9]*([-_][a-z0-9]+)*")


def new(name: str, parent: Path) -> Path:
    """Write the package of a variant as `parent`/lora-lite-`name`: all of it or nothing. Returns
    its folder.

    Raises:
        LoraLiteError: the name cannot be used, or the folder cannot be written.
    """
    dashed, snake = name.replace("_", "-"), name.replace("-", "_")
    folder = parent / f"lora-lite-{dashed}"
    if not NAME.fullmatch(name) or iskeyword(name):
        raise LoraLiteError(
            f"{name!r}: expected lower-case words joined by - or _, without lora-lite before them: "
            "my-method"
        )
    if snake in {*variants(), *first_party("variants"), "core", "benchmark"}:
        raise LoraLiteError(
            f"{snake!r} is taken by a variant or package that exists; choose another name"
        )
    if folder.exists():
        raise LoraLiteError(f"{folder} is there already; choose another name, or remove it")
    major, minor = metadata.version("lora-lite-core").split(".")[:2]
    bounds = f">={major}.{minor},<{major}.{int(minor) + 1}"
    camel = snake.title().replace("_", "")
    words = {"my_method": snake, "my-method": dashed, "MyMethod": camel, "CORE_BOUNDS": bounds}

    def exchanged(text: str) -> str:
        return re.sub("|".join(words), lambda word: words[word[0]], text)

    with TemporaryDirectory(dir=parent) as temporary:
        for source in TEMPLATE.rglob("*.tmpl"):
            place = source.relative_to(TEMPLATE).with_suffix("")
            target = Path(temporary, "made", exchanged(str(place)))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(exchanged(source.read_text("utf-8")), "utf-8")
        return Path(temporary, "made").rename(folder)
