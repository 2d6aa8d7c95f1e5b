"""The page of a parity report in headless Chromium: light and dark, narrow and wide, and with hostile texts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from html import escape
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from loraover_serve.parity.report.html import render
from loraover_serve.parity.report.parity_report import ParityReport

from support.chromium import FLAGS
from support.clockwork import whole_report

pytestmark = pytest.mark.engine

DARK = ("--force-dark-mode", "--blink-settings=preferredColorScheme=0")
POLICY = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
TELLS_WIDTH = """<script>
const page = document.documentElement
parent.document.title = page.scrollWidth + " in " + page.clientWidth
</script>"""
HOSTILE = "<script>document.title = 'ran'</script><img src=x onerror=\"document.title='ran'\">$\\frac$ & 'q' \""


def chromium(folder: Path, page: str, *flags: str) -> str:
    """Load a page, and return what the command prints."""
    command = shutil.which("chromium")
    if command is None:
        pytest.skip("no command chromium on PATH")
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    profile = tempfile.mkdtemp(dir=folder)
    words = [command, *FLAGS, f"--user-data-dir={profile}", *flags, file.as_uri()]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.fixture(scope="module")
def report() -> ParityReport:
    return whole_report()


@pytest.fixture(scope="module")
def page(report: ParityReport) -> str:
    return render(report)


@pytest.mark.parametrize(("flags", "is_light"), [((), True), (DARK, False)])
def test_the_page_follows_the_readers_colours(
    flags: tuple[str, ...], is_light: bool, page: str, tmp_path: Path
) -> None:
    shot = tmp_path / "shot.png"
    chromium(tmp_path, page, f"--screenshot={shot}", "--window-size=1200,2000", *flags)
    pixels: Any = imread(str(shot))[..., :3]  # rows, columns, red to blue from 0 to 1
    background = pixels[[2, 2, -2, -2], [2, -2, 2, -2]]
    assert (background > 0.9).all() if is_light else (background < 0.2).all()
    assert pixels.std() > 0.05, "nothing is drawn on it"


@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_fits_its_window(width: int, page: str, tmp_path: Path) -> None:
    assert page.count(POLICY) == 1
    scripted = page.replace(POLICY, "").replace("</body>", f"{TELLS_WIDTH}</body>")
    frame = f'<iframe style="width: {width}px; border: 0" srcdoc="{escape(scripted)}"></iframe>'  # windows are wider
    found = re.search(r"<title>(\d+) in (\d+)</title>", chromium(tmp_path, frame, "--dump-dom"))
    assert found is not None
    needed, given = map(int, found.groups())
    assert needed == given
    assert width - 20 <= given <= width, "a scroll bar takes the rest"


@pytest.fixture(scope="module")
def hostile_page(report: ParityReport) -> str:
    content = json.loads(report.model_dump_json())
    content |= {"base_model": HOSTILE, "command": HOSTILE, "reason": HOSTILE, "hardware": HOSTILE}
    for entry in (*content["results"], *content["runs"], *content["throughputs"], *content["outputs"]):
        entry["engine"] = "<img src=x>$\\frac$"
    return render(ParityReport.model_validate_json(json.dumps(content)))


def test_text_from_elsewhere_is_escaped(hostile_page: str) -> None:
    assert "<script" not in hostile_page
    assert "<img" not in hostile_page
    assert "&lt;script&gt;" in hostile_page


def test_the_page_names_no_address(page: str) -> None:
    found = set(re.findall(r"\w+://[\w.]+", page))
    assert found <= {f"http://{host}" for host in ("www.w3.org", "purl.org", "creativecommons.org")}, (
        "these are names of XML vocabularies, which no browser fetches"
    )


def test_a_browser_takes_hostile_texts_for_texts(hostile_page: str, tmp_path: Path) -> None:
    shown = chromium(tmp_path, hostile_page, "--dump-dom")
    assert "<title>Parity: " in shown
    assert "&lt;script&gt;" in shown
    assert "<script" not in shown
    assert "<img" not in shown


def test_the_policy_keeps_scripts_from_running(page: str, tmp_path: Path) -> None:
    shown = chromium(tmp_path, page.replace("</body>", f"{TELLS_WIDTH}</body>"), "--dump-dom")
    assert "<script" in shown
    assert "<title>Parity: " in shown
