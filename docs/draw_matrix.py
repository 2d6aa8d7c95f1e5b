"""Draw the table of engines and adapters in docs/compatibility.md as docs/figures/matrix.svg.

    python docs/draw_matrix.py [--check]

`--check` writes nothing, and fails if the kept picture is not the one of the table.
"""

from __future__ import annotations

import sys
from pathlib import Path

from loraover.common.atomic_output import publish_text
from loraover.reporting.svg import SMALL, Drawing, Shape

DOCS = Path(__file__).parent
TABLE, FIGURE = DOCS / "compatibility.md", DOCS / "figures" / "matrix.svg"
LEGEND: dict[str, tuple[str, Shape]] = {
    "as trained": ("good", "circle"),
    "wrong silently": ("bad", "triangle"),
    "refused": ("open", "square"),
}
"""Colour and shape of each verdict; what cannot be asked of an engine is left empty."""
NAMES, FORMS, COLUMN, ROW, TOP = 164.0, 46.0, 25.0, 20.0, 116.0


def rows_of(page: str) -> list[list[str]]:
    """Cells of the page's first table: a row of headings, and one for each engine and form."""
    lines = page[page.index("| engine | form |") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def draw(rows: list[list[str]]) -> str:
    """The picture as a file."""
    (_, _, *kinds), *cells = rows
    picture = Drawing(NAMES + FORMS + COLUMN * len(kinds), TOP + ROW * len(cells) + 8)
    left = 8.0
    for verdict, (color, shape) in LEGEND.items():
        picture.mark(left + 6, 16, color, shape)
        picture.text(left + 18, 20, verdict)
        left += 110
    for index, kind in enumerate(kinds):
        picture.text(NAMES + FORMS + COLUMN * (index + 0.5) + 4, TOP - 10, kind, turn=-90)
    for index, (engine, form, *verdicts) in enumerate(cells):
        top = TOP + ROW * index
        if index == 0 or engine != cells[index - 1][0]:
            picture.line([(0, top - 4), (picture.width, top - 4)], "line", width=1)
            picture.text(0, top + 10, engine.partition(", ")[2], size=SMALL)
        picture.text(NAMES, top + 10, form)
        for column, verdict in enumerate(verdicts):
            if verdict in LEGEND:
                picture.mark(NAMES + FORMS + COLUMN * (column + 0.5), top + 6, *LEGEND[verdict])
    return picture.figure("matrix", "What each engine makes of each kind of adapter, in PEFT's form and in ours").file()


def main() -> None:
    """Draw the picture, or check the kept one."""
    drawn = draw(rows_of(TABLE.read_text()))
    if "--check" not in sys.argv[1:]:
        publish_text(FIGURE, drawn)
    elif drawn != FIGURE.read_text():
        sys.exit(f"{FIGURE} is not the picture of {TABLE.name}: python docs/draw_matrix.py")


if __name__ == "__main__":
    main()
