"""Pages in headless Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
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
function long(text) {
  const sentences = text.textContent.trim().split(/(?<=[.!?])\\s+/)
  text.replaceChildren(...sentences.map(each => Object.assign(document.createElement("div"), {textContent: each})))
  const line = parseFloat(getComputedStyle(text).lineHeight)
  // A verdict is one sentence, with what is right.
  const isPhone = text.ownerDocument.documentElement.clientWidth < 480
  const most = text.matches(".sentence, .reason") && isPhone ? 4.5 : 2.5
  const isLong = each => each.getBoundingClientRect().height > most * line
  return [...text.children].filter(isLong).map(each => each.textContent)
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
      long: [...page.querySelectorAll("header p, main :is(p, li, figcaption)")].flatMap(long),
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


def looked_at(
    folder: Path, pages: Mapping[str, str], widths: Sequence[int], *, is_dark: bool
) -> dict[tuple[str, int], dict[str, Any]]:
    """Load pages in frames of these widths, since windows are wider, and return what the browser measures in each.

    The pages may write nothing to the console.
    """
    places = [(name, width) for name in pages for width in widths]
    frames = "".join(
        f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{escape(pages[name])}"></iframe>'
        for name, width in places
    )
    flags = ("--dump-dom", "--window-size=1400,1900", *(DARK if is_dark else ()))
    shown, console = chromium(folder, f"<title></title>{MEASURES}<body>{frames}", *flags)
    assert console == []
    found = re.search(r"<title>(\[.*?\])</title>", shown, re.DOTALL)
    assert found is not None, shown[:500]
    return dict(zip(places, json.loads(unescape(found[1])), strict=True))
