"""Write the lines of `loraover check --json` as a table in Markdown: python summary.py LINES."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLUMNS = ("adapter", "verdict", "kind", "rank", "engines as it is", "what fixes it, or what is wrong")


def cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of one adapter, in which nothing is markup."""
    engines = ", ".join(f"{engine}: {verdict}" for engine, verdict in row["engines"].items())
    told = " ".join(text for text in (row["done"], row["reason"].replace("\n", " ")) if text)
    found = (row["address"], row["verdict"], row["kind"], row["rank"], engines, told)
    return [escaped("" if cell is None else str(cell)) for cell in found]


def escaped(text: str) -> str:
    """Return a text with each character that Markdown or HTML could read as markup written as an entity."""
    return "".join(c if c.isalnum() or c in " .,:;/-_" else f"&#{ord(c)};" for c in text)


def main(path: str) -> None:
    """Print the table of a file of lines."""
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    rows += [cells(json.loads(line)) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
