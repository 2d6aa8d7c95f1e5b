"""Hook of mkdocs that makes links work in the documentation site as they work on a code host.

README.md and its neighbours lie above `docs/`, and pages link to source files and folders. In the site, README.md is
the home page, which begins with what the product does, its neighbours are pages, and a link to a file that the site
does not contain leads to the code host.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ABOVE = {"README.md": "index.md"} | {name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")}
"""Pages that lie above `docs/`, and their places in the site."""

CODE = re.compile(r"(^```.*?^```|^(?: {4}|\t).*?$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?(?=\))")


def relative_links(text: str) -> Iterator[str]:
    """Targets of the relative links of a Markdown page, without anchors and without links inside code."""
    for part in CODE.split(text)[::2]:
        for link in LINK.finditer(part):
            yield link["target"]


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie above `docs/` to the site."""
    for name, place in ABOVE.items():
        text = (ROOT / name).read_text()
        files.append(File.generated(config, place, content=_home(text) if name == "README.md" else text))
    return files


def _home(readme: str) -> str:
    """Return the home page: README.md with its commands of make behind what the product does."""
    commands = re.search(r"^(?: {4}make .*\n)+\n", readme, re.MULTILINE)
    if commands is None:
        return readme
    rest = readme.replace(commands[0], "", 1)
    return rest.replace("\n## ", f"\nIn a clone:\n\n{commands[0]}## ", 1)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point the links of one page at pages and files of the site, or at the code host for what the site lacks."""
    place = page.file.src_uri
    homes = {site: name for name, site in ABOVE.items()}
    source = homes.get(place, f"docs/{place}")

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link["target"]))
        anchor = link["anchor"] or ""
        inside = ABOVE.get(target, target.removeprefix("docs/") if target.startswith("docs/") else None)
        if inside is not None:
            for candidate in (inside, f"{inside}/README.md"):
                file = files.get_file_from_path(candidate)
                if file is not None and file.inclusion.is_included():
                    return posixpath.relpath(candidate, posixpath.dirname(place) or ".") + anchor
        if not (ROOT / target).exists():
            return link[0]  # mkdocs warns of it
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{config.repo_url.rstrip('/')}/{kind}/main/{target}{anchor}"

    parts = CODE.split(markdown)
    return "".join(part if index % 2 else LINK.sub(moved, part) for index, part in enumerate(parts))
