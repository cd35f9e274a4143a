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
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_lite_benchmark.config import RunConfig
from lora_lite_benchmark.figures import Figures
from lora_lite_benchmark.headline import headline
from lora_lite_benchmark.palette import DARK, LIGHT, Palette, contrast
from lora_lite_benchmark.report import make_report
from lora_lite_benchmark.results import Result
from lora_lite_benchmark.run import run_one
from lora_lite_benchmark.sweep import Choice, Trial
from lora_lite_benchmark.table import make_tables
from markupsafe import escape

HELD_OUT = {"forgetting": {"path": "tiny", "split": "home", "count": 4}, "scales": [0.0, 0.5, 1.0]}
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
        if self.open and self.open[-1] in ("th", "td", "small"):
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
        *(make_config("lora", seed=seed, **HELD_OUT) for seed in (0, 1)),
        make_config("lora:r=2", **HELD_OUT),
    ]
    return [run_one(config, out) for config in configs]


CHOICES = [
    Choice.of(
        "lora",
        [
            Trial(lr=lr, fields={}, loss=loss, accuracy=0.5)
            for lr, loss in ((0.01, 2.0), (0.1, 1.0), (1.0, float("inf")), (0.05, 1.1), (0.2, 1.3))
        ],
        on_grid=3,
    )
]


@pytest.fixture(scope="module")
def report(results: list[Result]) -> str:
    return make_report(make_tables(results))


def test_the_page_is_whole(report: str) -> None:
    """Every tag is closed, and the page has the table's cells, four pictures, and the config of
    every run; with a sweep, two pictures more.
    """
    page = Page(report)
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    assert len(page.texts["config"]) == 4


def test_a_sweep_has_pictures_of_its_own(results: list[Result], report: str) -> None:
    """Its curve without the trial that failed, and the loss at half and at twice the best rate."""
    with_sweep = make_report(make_tables(results), CHOICES)
    assert with_sweep.count("<svg") == report.count("<svg") + 2
    assert "How the settings were chosen" in with_sweep
    assert "How the settings were chosen" not in report


def test_the_page_quotes_every_row(results: list[Result], report: str) -> None:
    (table,) = make_tables(results)
    for row in table.figures:
        assert str(escape(row["sentence"])) in report


@settings(max_examples=50)
@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=60, unique=True))
def test_colours_stand_out_from_both_backgrounds(methods: list[str]) -> None:
    """Every method's colour has a contrast of three at the least, whatever their number, and has a
    variable in the style sheet that no other method has.
    """
    palette = Palette(methods)
    for background in (LIGHT, DARK):
        assert min(contrast(palette.on(method, background), background) for method in methods) >= 3
    assert len({palette.variable(method) for method in methods}) == len(methods)
    assert palette.style_sheet().count("light-dark(") == len(methods)


def test_pictures_take_their_colours_from_the_page(report: str) -> None:
    """No colour is fixed but the grid's: each is the theme's ink or a method's variable."""
    for svg in re.findall(r"<svg.*?</svg>", report, re.DOTALL):
        assert set(re.findall(r"(?:stroke|fill): (#\w+)", svg)) <= {"#b0b0b0"}  # the grid
        assert "var(--method-" in svg


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([("base", 0.2), ("lora", 0.8), ("ia3", 0.77)], "ia3 gains 95 % of what lora gains over"),
        ([("base", 0.2), ("lora", 0.8), ("ia3", 0.9)], "ia3 gains as much as lora"),
        ([("base", 0.2), ("lora", 0.8), ("ia3", 0.3)], "lora is best, with 80.0 % right"),
        ([("base", 0.2), ("ia3", 0.3)], "ia3 is best, with 30.0 % right; the base has 20.0 %"),
        ([("base", 0.2)], "The base alone was tested"),
    ],
)
def test_the_headline_says_what_was_found(rows: list[tuple[str, float]], says: str) -> None:
    figures: list[Figures] = [
        {
            "label": label,
            "variant": label,
            "parameters": 1000 if label == "lora" else 10,
            "test_accuracy": accuracy,
            "test_loss": 1.0,
            "accuracy_minus_lora_p": 0.001,
        }
        for label, accuracy in rows
    ]
    assert says in headline(figures)
    for row in figures:
        row["accuracy_minus_lora_p"] = 0.4
    assert "gains" not in headline(figures)


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


def _asked(page: str, expression: str, folder: Path, width: int) -> str:
    """What a browser says to an expression, once it shows the page."""
    probe = f"<script>document.title = {expression}</script></body>"
    open_policy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    document = _opened(open_policy.replace("</body>", probe), folder, width)
    return re.findall(r"<title>(.*?)</title>", document)[0]


@in_a_browser
def test_a_browser_shows_the_table(results: list[Result], report: str, tmp_path: Path) -> None:
    """Chromium builds the same table out of the page, and the pictures are there."""
    document = _opened(report, tmp_path, 1280)
    (table,) = make_tables(results)
    assert Page(document).rows == [list(table.header), *map(list, table.cells)]
    assert document.count("<svg") == 4


@in_a_browser
@pytest.mark.parametrize("width", [500, 1280])
def test_the_page_fits_the_window(report: str, tmp_path: Path, width: int) -> None:
    """The page itself never scrolls sideways; what is wider scrolls within its own box.

    Chromium opens no window that is narrower than 500 pixels.
    """
    widths = "document.documentElement.scrollWidth + ' ' + innerWidth"
    found = _asked(report, widths, tmp_path, width)
    page, window = map(int, found.split())
    assert page <= window == width


@in_a_browser
@pytest.mark.parametrize("width", [500, 1280])
def test_no_column_is_hidden(report: str, tmp_path: Path, width: int) -> None:
    """The table is no wider than its box, at the width of a laptop and of a phone."""
    table = "document.querySelector('.scroll')"
    found = _asked(report, f"{table}.scrollWidth + ' ' + {table}.clientWidth", tmp_path, width)
    whole, shown = map(int, found.split())
    assert whole <= shown


@in_a_browser
def test_a_browser_runs_nothing(results: list[Result], tmp_path: Path) -> None:
    """Even a page whose answers are scripts keeps its own title."""
    document = _opened(make_report(make_tables(_with_evil(results))), tmp_path, 1280)
    assert "<title>lora-lite benchmark</title>" in document
