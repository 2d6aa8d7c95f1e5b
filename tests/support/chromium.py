"""Pages in headless Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
DARK = ("--force-dark-mode", "--blink-settings=preferredColorScheme=0")
MEASURES = """<script>
function outside(svg) {
  const edge = svg.getBoundingClientRect()
  return [...svg.querySelectorAll(":scope > text")].filter(text => {
    const box = text.getBoundingClientRect()
    const isTall = box.top < edge.top - 1 || box.bottom > edge.bottom + 1
    return isTall || box.left < edge.left - 1 || box.right > edge.right + 1
  }).map(text => text.textContent)
}
onload = () => {
  document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement
    const texts = [...page.querySelectorAll("svg text")].map(text => text.getBoundingClientRect().height)
    return {
      given: root.clientWidth,
      needed: root.scrollWidth,
      ground: getComputedStyle(page.body).backgroundColor,
      ink: getComputedStyle(page.body).color,
      title: page.title,
      figures: page.querySelectorAll("figure > svg").length,
      outside: [...page.querySelectorAll("figure > svg")].flatMap(outside),
      cut: [...page.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth + 1).map(
        box => `${box.scrollWidth} > ${box.clientWidth}: ${box.querySelector("tr").textContent}`),
      scripts: page.querySelectorAll("script, img").length,
      smallest: Math.min(...texts, 99),
    }
  }))
}
</script>"""


def chromium(folder: Path, page: str, *flags: str) -> tuple[str, list[str]]:
    """Load a page; return what the command prints, and the errors and warnings of the page's console."""
    command = shutil.which("chromium")
    if command is None:
        pytest.skip("no command chromium on PATH")
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    profile = tempfile.mkdtemp(dir=folder)
    words = [command, *FLAGS, "--enable-logging=stderr", f"--user-data-dir={profile}", *flags, file.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def looked_at(folder: Path, page: str, widths: Sequence[int], *, is_dark: bool) -> list[dict[str, Any]]:
    """Load a page in frames of these widths, since windows are wider, and return what the browser measures in each.

    The page may write nothing to the console.
    """
    frames = "".join(
        f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{escape(page)}"></iframe>'
        for width in widths
    )
    flags = ("--dump-dom", "--window-size=1400,1900", *(DARK if is_dark else ()))
    shown, console = chromium(folder, f"<title></title>{MEASURES}<body>{frames}", *flags)
    assert console == []
    found = re.search(r"<title>(\[.*?\])</title>", shown, re.DOTALL)
    assert found is not None, shown[:500]
    measured: list[dict[str, Any]] = json.loads(unescape(found[1]))
    return measured
