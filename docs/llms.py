"""Hook of mkdocs that writes llms.txt, the list of the site's pages for programs that read it (llmstxt.org)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FIRST = re.compile(r"(?:\A|\n\n)(?!```|[#|!<>\- ]|\d+\.)(.+?)(?:\n\n|\Z)", re.DOTALL)
"""First paragraph of a page, which is neither a heading nor a list, a table, a picture or code."""

_nav: list[Any] = []
_summaries: dict[str, str] = {}


def on_nav(nav: Any, config: Any, files: Any) -> None:
    """Keep the order of the pages."""
    _nav[:] = nav.items


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> None:
    """Keep the first sentence of a page."""
    found = FIRST.search(markdown)
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[*`]", r"\1", " ".join(found[1].split())) if found else ""
    _summaries[page.file.src_uri] = re.split(r"(?<=\.) (?=[A-Z])", plain)[0]


def on_post_build(config: Any) -> None:
    """Write the list beside the pages."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", *_lines(_nav)]
    Path(config.site_dir, "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _lines(items: Any, section: str = "") -> Iterator[str]:
    """Lines of a section's pages, and then those of the sections in it."""
    pages = [item for item in items if item.is_page]
    if section and pages:
        yield from ("", f"## {section}", "")
    for page in pages:
        summary = _summaries.get(page.file.src_uri, "")
        yield f"- [{page.title}]({page.url or 'index.html'})" + (f": {summary}" if summary else "")
    for item in items:
        if item.is_section:
            yield from _lines(item.children, f"{section}, {item.title}" if section else item.title)
