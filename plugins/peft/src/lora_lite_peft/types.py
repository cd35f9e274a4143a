"""What the writers of PEFT's own types share."""

import re
from collections.abc import Callable
from typing import Any

from lora_lite import AdapterError
from lora_lite.author import Base

from lora_lite_peft.files import Folder
from lora_lite_peft.parts import Part

Writer = Callable[[Part, Base], Folder]


def exactly(path: str) -> str:
    """A pattern for one path: PEFT looks for patterns at the end of paths."""
    return f"^{re.escape(path)}"


def refuse_scaled(adapter: Part) -> None:
    if adapter.scale != 1:
        raise AdapterError(
            f"adapter {adapter.name!r} has scale {adapter.scale:g}, and PEFT's own type has none",
            fix='Set scale = 1, or write format="merged"',
            adapter=adapter.name,
        )


def one_of_each(adapter: Part, field: str) -> Any:
    """The value of a field that must be the same at every layer."""
    values = {getattr(variant, field) for variant in adapter.sites.values()}
    if len(values) > 1:
        raise AdapterError(
            f"the layers have different values of {field}: {', '.join(map(repr, sorted(values)))}",
            expected="PEFT's own type has one for all layers",
            fix="Leave native=True out",
            adapter=adapter.name,
        )
    return values.pop()
