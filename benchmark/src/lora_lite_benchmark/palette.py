"""One colour for each method, in every picture and table of a page, in both themes.

Hues are a golden angle apart, so that neighbours in a list differ. A colour is as light as it takes
to stand out from its background with a contrast of CONTRAST (WCAG 2.2, where 3 is asked for).
"""

import colorsys
from collections.abc import Iterable

__all__ = ["CONTRAST", "DARK", "LIGHT", "Palette", "contrast"]

CONTRAST = 4.5
LIGHT, DARK = "#ffffff", "#121212"
"""The backgrounds of the two themes."""

GOLDEN_ANGLE = 0.381966
FIRST_HUE = 0.58
SATURATION = 0.75
SENTINEL = "#01fe{:02x}"
"""A colour that nothing else has: in an SVG it becomes a variable of the page."""


class Palette:
    """The colours of some methods, in the order in which they are given."""

    def __init__(self, methods: Iterable[str]) -> None:
        self.hues = {
            method: (FIRST_HUE + index * GOLDEN_ANGLE) % 1.0
            for index, method in enumerate(dict.fromkeys(methods))
        }

    def on(self, method: str, background: str) -> str:
        """The colour of a method on a background, as #rrggbb."""
        return _shade(self.hues[method], background)

    def sentinel(self, method: str) -> str:
        """What stands for the method's colour in a picture; see `with_variables`."""
        return SENTINEL.format(list(self.hues).index(method))

    def variable(self, method: str) -> str:
        """The name of the method's colour in the style sheet of a page."""
        return f"--method-{list(self.hues).index(method)}"

    def with_variables(self, svg: str) -> str:
        """The picture with colours that follow the theme of the page."""
        for method in self.hues:
            svg = svg.replace(self.sentinel(method), f"var({self.variable(method)})")
        return svg

    def style_sheet(self) -> str:
        """The colours of both themes, for the rule `:root`."""
        return " ".join(
            f"{self.variable(method)}: light-dark({self.on(method, LIGHT)}, "
            f"{self.on(method, DARK)});"
            for method in self.hues
        )


def contrast(one: str, other: str) -> float:
    """How far two colours are apart, from 1 to 21, as WCAG defines it."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def _shade(hue: float, background: str) -> str:
    """The hue at the lightness that is nearest to the background's and still stands out."""
    near, far = (1.0, 0.0) if _luminance(background) > 0.5 else (0.0, 1.0)
    for _ in range(20):
        middle = (near + far) / 2
        if contrast(_hex(hue, middle), background) < CONTRAST:
            near = middle
        else:
            far = middle
    return _hex(hue, far)


def _hex(hue: float, lightness: float) -> str:
    channels = colorsys.hls_to_rgb(hue, lightness, SATURATION)
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)


def _luminance(color: str) -> float:
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (
        channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
        for channel in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
