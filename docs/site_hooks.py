"""Hooks of the site's builder: formulas become MathML, links into the code get an address.

A page writes a formula as `$\\Delta y = B A x$`, or between two lines of `$$`, which code hosts
show as mathematics as well. It is turned into MathML while the site is built, so that a reader's
browser needs neither a script nor a font from elsewhere.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING

import site_results
from latex2mathml.converter import convert

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

ROOT = Path(__file__).parents[1]

README_OF_A_PLUGIN = re.compile(r'^--8<-- "(plugins/[\w-]+/README\.md)"$', re.MULTILINE)
RESULTS = "<!-- results -->"
LINK_OUT_OF_THE_DOCS = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([\w./-]+)\)")
INLINE_FORMULA = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK_FORMULA = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
GREEK_CAPITAL = re.compile(r"<mi>(&#x0039[1-9A-F];|&#x003A[0-9];)</mi>")


def on_page_markdown(markdown: str, config: MkDocsConfig, **_: object) -> str:
    """Put in the results and the READMEs that a page asks for, and complete links into the code."""

    def read(found: re.Match[str]) -> str:
        return body_of_readme((ROOT / found[1]).read_text(encoding="utf-8"))

    def complete(found: re.Match[str]) -> str:
        text, path = found.groups()
        if not (ROOT / path).exists():  # a link from one page of the site to another
            return found[0]
        if not config.repo_url:
            return text
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})"

    if RESULTS in markdown:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        markdown = markdown.replace(RESULTS, site_results.short_table(site_results.results(readme)))
    return LINK_OUT_OF_THE_DOCS.sub(complete, README_OF_A_PLUGIN.sub(read, markdown))


def on_page_content(content: str, **_: object) -> str:
    """Turn every formula of the page into MathML."""
    content = BLOCK_FORMULA.sub(
        lambda found: f'<div class="formula">{mathml(found[1], "block")}</div>', content
    )
    return INLINE_FORMULA.sub(lambda found: mathml(found[1], "inline"), content)


def body_of_readme(readme: str) -> str:
    """A plugin's README without what its page on the site has already: title and formula.

    The formula is the indented text before the first example or section.
    """
    lines = readme.splitlines()
    starts = (number for number, line in enumerate(lines) if line.startswith(("```", "## ")))
    first = next(starts, len(lines))
    head = [line for line in lines[:first] if not line.startswith(("# ", "    "))]
    return "\n".join(head + lines[first:])


def mathml(formula: str, display: str) -> str:
    """The formula as MathML, its Greek capitals upright."""
    converted: str = convert(html.unescape(formula).strip(), display=display)
    return GREEK_CAPITAL.sub(r'<mi mathvariant="normal">\1</mi>', converted)
