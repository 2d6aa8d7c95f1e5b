"""What the pages for contributors name is there: files, tables, targets of make, and one address of the repository."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "SECURITY.md", ".github/pull_request_template.md")


def names(page: str) -> list[str]:
    """What stands in backticks on a page, outside of code blocks."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_folder_is_there(page: str) -> None:
    links = re.findall(r"\]\(([^):]+)\)", (ROOT / page).read_text())
    files = [n for n in names(page) if re.fullmatch(r"[\w.][\w./-]*/[\w./-]*", n) and "NAME" not in n]
    assert [name for name in links + files if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_target_of_make_is_there(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert [n for n in names(page) if n.startswith("make ") and n.removeprefix("make ") not in targets] == []


def test_every_table_is_where_it_is_said_to_be() -> None:
    said = re.findall(r"`(\w+)`\s(?:in|of)\s`([\w./]+/\w+\.py)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert len(said) > 10
    assert [(n, file) for n, file in said if not re.search(rf"\b{n}\b", (ROOT / file).read_text())] == []


def test_the_repository_has_one_address() -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    files = [ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "pyproject.toml")]
    files += [path for path in (ROOT / ".github").rglob("*") if path.is_file()]
    found = re.findall(r"https://github\.com/[\w-]+/loraover\b", "".join(path.read_text() for path in files))
    assert len(found) > 6
    assert set(found) == {urls["Homepage"]}
