"""The pages of all reports in headless Chromium: light and dark, narrow and wide, and with hostile texts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import pytest

from loraover.adapters.verdict import CheckVerdict
from loraover.reporting.html_page import Page, in_sentences
from loraover.reporting.palette import BAD, GOOD, GROUNDS, INKS, OPEN, PALETTE, tone_of
from loraover_export.check import report as check
from loraover_export.prepare import report as fleet
from loraover_serve.judge import limits
from loraover_serve.parity.report import EngineVerdict

from support.chromium import chromium, looked_at
from support.reports import REPORTS

POLICY = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
WIDTHS = (420, 1280)
LARGEST = 300_000  # bytes


@pytest.fixture(scope="module", params=REPORTS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def page(name: str) -> Page:
    return REPORTS[name].page()


@pytest.fixture(scope="module")
def hostile_page(name: str) -> Page:
    return REPORTS[name].hostile()


def rgb(color: str) -> str:
    return f"rgb({', '.join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))})"


Looks = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def looks(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Looks]:
    """What a browser measures of every page at each width, in light and dark."""
    pages, folder = {name: made.page().html for name, made in REPORTS.items()}, tmp_path_factory.mktemp("pages")
    return {is_dark: looked_at(folder, pages, WIDTHS, is_dark=is_dark) for is_dark in (False, True)}


@pytest.mark.engine
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("is_dark", [False, True])
def test_a_page_can_be_read_at_each_width_and_in_each_scheme(
    name: str, is_dark: bool, width: int, page: Page, looks: dict[bool, Looks]
) -> None:
    found = looks[is_dark][name, width]
    assert found["needed"] == found["given"], "the page scrolls sideways"
    assert width - 20 <= found["given"] <= width, "a scroll bar takes the rest"
    for kind, color in (("ground", "paper"), ("ink", "ink")):
        assert found[kind] == rgb(PALETTE[color].dark if is_dark else PALETTE[color].light)
    assert found["figures"] == page.html.count("<figure><figcaption>")
    assert found["outside"] == [], "texts leave their figure"
    assert width < WIDTHS[-1] or found["cut"] == [], "a table is cut"
    assert found["smallest"] >= 9, "pixels, the height of a line of text"
    assert found["long"] == [], "sentences of more than two lines, or verdicts of more than four on a phone"


@pytest.mark.engine
def test_a_browser_takes_hostile_texts_for_texts(tmp_path: Path) -> None:
    pages = {name: made.hostile().html for name, made in REPORTS.items()}
    for (name, _), found in looked_at(tmp_path, pages, WIDTHS, is_dark=False).items():
        assert found["title"].startswith(REPORTS[name].title)
        assert found["scripts"] == pages[name].count("<script>") == (name == "fleet"), "only the fleet's own"
        assert found["needed"] == found["given"], name
        assert found["outside"] == [], name


def test_text_from_elsewhere_is_escaped(hostile_page: Page) -> None:
    for text in (hostile_page.html, *(figure.file() for figure in hostile_page.figures)):
        assert "<script>document.title" not in text
        assert "<img" not in text
    assert "&lt;script&gt;" in hostile_page.html


@pytest.mark.engine
def test_the_policy_keeps_scripts_from_running(tmp_path: Path) -> None:
    page = REPORTS["parity"].page().html
    assert page.count(POLICY) == 1
    script = "<script>document.title = 'ran'</script></body>"
    for text, ran in ((page, False), (page.replace(POLICY, ""), True)):
        shown, _ = chromium(tmp_path, text.replace("</body>", script), "--dump-dom")
        assert ("<title>ran</title>" in shown) == ran


def test_a_page_is_small_and_names_no_address(page: Page) -> None:
    assert len(page.html.encode()) < LARGEST
    assert not re.findall(r"\w+://[\w.]+", page.html)


def test_a_page_begins_with_its_verdict(page: Page) -> None:
    head = page.html.index('<p class="sentence">')
    assert head < page.html.index("<dl>") < page.html.index("<main>")
    assert re.search("<dt>(date|now)</dt>", page.html)


def test_the_column_of_the_verdict_is_the_first(page: Page) -> None:
    for head in re.findall("<thead><tr>(.*?)</tr>", page.html):
        names = re.findall("<th[^>]*>(.*?)</th>", head)
        assert "verdict" not in names[1:]
        assert "explains" not in names[1:]


@pytest.mark.parametrize("is_hostile", [False, True])
def test_figures_are_files_too(is_hostile: bool, page: Page, hostile_page: Page, tmp_path: Path) -> None:
    found = hostile_page if is_hostile else page
    found.write(tmp_path / "report.html")
    files = sorted(tmp_path.rglob("*.svg"))
    assert len(files) == len(found.figures)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", *(file.parent.name for file in files)}
    for file in files:
        assert ElementTree.parse(file).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in file.read_text(), "other programs than browsers do not know the page's colours"


def contrast(one: str, other: str) -> float:
    """The contrast of two colours such as "#777777", from 1 to 21: its ratio of luminances in WCAG 2.2."""
    low, high = sorted(map(_luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: str) -> float:
    shares = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("color", INKS)
def test_every_text_and_line_can_be_read_on_every_ground(color: str) -> None:
    for ground in GROUNDS.values():
        assert contrast(INKS[color].light, ground.light) >= 4.5
        assert contrast(INKS[color].dark, ground.dark) >= 4.5


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=1e-3)


def test_a_colour_has_one_meaning() -> None:
    for shades in ([c.light for c in INKS.values()], [c.dark for c in INKS.values()]):
        assert len(set(shades)) == len(INKS)


def test_clauses_outside_of_brackets_become_sentences() -> None:
    assert in_sentences("off by 1 nat (a; b); no fault explains it.") == "Off by 1 nat (a; b). No fault explains it."


def test_every_colour_that_a_page_names_is_in_the_palette(page: Page) -> None:
    assert set(re.findall(r"var\(--(\w+)\)", page.html)) <= set(PALETTE)


def test_every_verdict_of_a_command_has_one_tone() -> None:
    commands = (limits.Verdict, EngineVerdict, CheckVerdict, fleet.Verdict, check.Verdict)
    verdicts = {verdict for each in commands for verdict in get_args(each)}
    assert not set(GOOD) & set(BAD)
    assert {verdict for verdict in verdicts if tone_of(verdict) == "open"} == {*OPEN}
    assert verdicts | {"error"} >= {*GOOD, *BAD}
