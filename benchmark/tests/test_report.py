"""The report is one page that needs nothing else, says what the table says, and is no way in for
what a model writes.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.report import make_report
from lora_lite_benchmark.results import Result
from lora_lite_benchmark.run import run_one
from lora_lite_benchmark.table import make_tables

VOID = {"meta", "link", "br", "hr", "img", "input"}
EVIL = (
    "</pre><script>document.title='pwned'</script><img src=x onerror=alert(1)> $\\alpha$ &amp; \"'"
)

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
in_a_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed (Debian: apt install chromium)"
)


class Page(HTMLParser):
    """What a page holds: its tags, the cells of its table, the texts by class. Fails on tags that
    are not closed.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.texts: dict[str, list[str]] = {}
        self.catching: str | None = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag == "pre":
            self.catching = dict(attributes)["class"]
            self.texts.setdefault(self.catching or "", []).append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "pre":
            self.catching = None

    def handle_data(self, text: str) -> None:
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1][-1] += text
        if self.catching:
            self.texts[self.catching][-1] += text


@pytest.fixture(scope="module")
def results(
    make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> list[Result]:
    """The base, LoRA with two seeds, and a second row."""
    out = tmp_path_factory.mktemp("out")
    configs = [
        make_config("base"),
        *(make_config("lora", seed=seed) for seed in (0, 1)),
        make_config("lora:r=2"),
    ]
    return [run_one(config, out) for config in configs]


@pytest.fixture(scope="module")
def report(results: list[Result]) -> str:
    return make_report(make_tables(results))


def test_the_page_is_whole(report: str) -> None:
    """Every tag is closed, and the page has the table's cells, three pictures, and the config of
    every run.
    """
    page = Page(report)
    assert sum(tag == "svg" for tag, _ in page.tags) == 3
    assert len(page.texts["config"]) == 4


def test_the_page_has_the_tables_cells(results: list[Result], report: str) -> None:
    (table,) = make_tables(results)
    assert Page(report).rows == [list(table.header), *map(list, table.cells)]


def test_the_page_has_the_exact_configs(results: list[Result], report: str) -> None:
    """What is printed is the config that was run: it has the same hash."""
    printed = [json.loads(text) for text in Page(report).texts["config"]]
    for entry in printed:
        assert RunConfig.model_validate_json(json.dumps(entry["config"])).hash == entry["hash"]
    assert {entry["hash"] for entry in printed} == {result.hash for result in results}


def test_the_page_needs_nothing_else(report: str) -> None:
    """Nothing is fetched and no script runs: the namespaces of SVG are the only addresses."""
    page = Page(report)
    assert {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "image",
    } == set()
    addresses = {
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href")
    }
    assert all((address or "").startswith("#") for address in addresses)
    assert "url(http" not in report


def test_pictures_do_not_share_ids(report: str) -> None:
    """An id that occurs twice is the same drawing, made for the same thing: matplotlib names it by
    its content.
    """
    drawn: dict[str, str] = {}
    for svg in re.findall(r"<svg.*?</svg>", report, re.DOTALL):
        for found in re.finditer(
            r'<(path|clipPath) id="(\w+)"(.*?)(?:/>|</clipPath>)', svg, re.DOTALL
        ):
            assert drawn.setdefault(found[2], found[3]) == found[3]


def test_the_same_results_give_the_same_page(results: list[Result], report: str) -> None:
    assert make_report(make_tables(results[::-1])) == report


def _with_evil(results: list[Result]) -> list[Result]:
    """The results of models, questions and labels that would like to be markup."""
    changed = []
    for result in results:
        assert result.test is not None
        outcomes = tuple(
            outcome.model_copy(update={"prediction": EVIL, "question": EVIL, "number": EVIL})
            for outcome in result.test.outcomes
        )
        config = result.config.model_copy(
            update={"label": f"{result.config.label}{EVIL}", "model": f"models/{EVIL}"}
        )
        changed.append(
            result.model_copy(
                update={
                    "config": config,
                    "test": result.test.model_copy(update={"outcomes": outcomes}),
                }
            )
        )
    return changed


def test_what_a_model_writes_stays_text(results: list[Result], report: str) -> None:
    """Markup in predictions, questions, labels and paths is shown as it was written; no tag comes
    from it.
    """
    page = Page(make_report(make_tables(_with_evil(results))))
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in Page(report).tags}
    assert page.texts["answer"] == [EVIL] * len(page.texts["answer"])
    assert page.texts["question"][0] == EVIL


def _opened(page: str, folder: Path, width: int) -> str:
    """The document as the browser has it after loading."""
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}/profile",
    ]
    command += [f"--window-size={width},900", "--dump-dom", path.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@in_a_browser
def test_a_browser_shows_the_table(results: list[Result], report: str, tmp_path: Path) -> None:
    """Chromium builds the same table out of the page, and the pictures are there."""
    document = _opened(report, tmp_path, 1280)
    (table,) = make_tables(results)
    cells = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)
        for row in re.findall(r"<tr>.*?</tr>", document, re.DOTALL)
    ]
    assert cells == [list(table.header), *map(list, table.cells)]
    assert document.count("<svg") == 3


@in_a_browser
@pytest.mark.parametrize("width", [500, 1280])
def test_the_page_fits_the_window(report: str, tmp_path: Path, width: int) -> None:
    """The page itself never scrolls sideways; what is wider scrolls within its own box.

    Chromium opens no window that is narrower than 500 pixels.
    """
    width_in_title = "document.title = document.documentElement.scrollWidth + ' of ' + innerWidth"
    probe = f"<script>{width_in_title}</script></body>"
    open_policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report)
    document = _opened(open_policy.replace("</body>", probe), tmp_path, width)
    found = re.search(r"<title>(\d+) of (\d+)</title>", document)
    assert found
    assert int(found[1]) <= int(found[2]) == width


@in_a_browser
def test_a_browser_runs_nothing(results: list[Result], tmp_path: Path) -> None:
    """Even a page whose answers are scripts keeps its own title."""
    document = _opened(make_report(make_tables(_with_evil(results))), tmp_path, 1280)
    assert "<title>lora-lite benchmark</title>" in document
