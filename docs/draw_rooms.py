"""Draw the rooms of the four packages, and the imports between them, as docs/rooms.svg.

    python docs/draw_rooms.py           # write the figure
    python docs/draw_rooms.py --check   # exit code 1 if the figure shows other imports

A room is a folder of a package. An arrow from one room to another means that the first imports the second; it is left
out if a longer path of arrows connects the two. Each room stands in a row above those of the rooms that it imports.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path
from typing import NamedTuple

import grimp

FIGURE = Path(__file__).with_name("rooms.svg")
PACKAGES = {"loraover": "#3b7dd8", "loraover_export": "#2e9e6b", "loraover_serve": "#d9822b", "loraover_lab": "#8250c4"}
COLUMNS = {"loraover_lab": (0, 230), "loraover": (0, 260), "loraover_export": (260, 790), "loraover_serve": (790, 1010)}
WIDTH, BOX, HEIGHT, ROW = 1010, 100, 44, 90
Arrows = dict[str, set[str]]


class Box(NamedTuple):
    """The middle of a room's box, in pixels."""

    x: float
    y: float


def read_arrows() -> Arrows:
    """Find the rooms that each room imports, such as {"loraover_lab.study": {"loraover.training", ...}}."""
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True)
    rooms = {child for package in PACKAGES for child in graph.find_children(package) if graph.find_children(child)}
    arrows: Arrows = {room: set() for room in rooms}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            source, target = room_of(module), room_of(imported)
            if source != target and source in rooms and target in rooms:
                arrows[source].add(target)
    return arrows


def room_of(module: str, depth: int = 2) -> str:
    """Return the name of the package or folder of a module: the first `depth` parts of its name."""
    return ".".join(module.split(".")[:depth])


def levels(arrows: Arrows) -> dict[str, int]:
    """Return each room's level: 0 if it imports no room, else one more than the highest level that it imports."""
    found: dict[str, int] = {}

    def level(room: str) -> int:
        if room not in found:
            found[room] = max((level(other) + 1 for other in arrows[room]), default=0)
        return found[room]

    return {room: level(room) for room in sorted(arrows)}


def without_implied(arrows: Arrows) -> Arrows:
    """Return the arrows between rooms that no longer path of arrows connects."""

    def reached(room: str) -> set[str]:
        return arrows[room].union(*(reached(other) for other in arrows[room]))

    return {room: {t for t in near if not any(t in reached(o) for o in near - {t})} for room, near in arrows.items()}


def place(level: dict[str, int], drawn: Arrows) -> dict[str, Box]:
    """Place the boxes: a row for each level, a column for each package, each room above the middle of its imports."""
    top = max(level.values())
    boxes: dict[str, Box] = {}
    for row in range(top + 1):
        for package, (left, right) in COLUMNS.items():
            rooms = [room for room in sorted(level, reverse=True) if level[room] == row and room_of(room, 1) == package]
            rooms.sort(key=lambda room: sum(boxes[other].x for other in drawn[room]) / max(1, len(drawn[room])))
            for i, room in enumerate(rooms):
                x = left + (right - left) * (i + 0.5) / len(rooms)
                boxes[room] = Box(x, HEIGHT + ROW * (top - row))
    return boxes


def draw(arrows: Arrows) -> str:
    """Return the figure as SVG."""
    level = levels(arrows)
    drawn = without_implied(arrows)
    boxes = place(level, drawn)
    height = 2 * HEIGHT + ROW * max(level.values())
    count = sum(map(len, arrows.values()))
    shown = sum(map(len, drawn.values()))
    title = f"{len(boxes)} rooms on {max(level.values()) + 1} levels, {count} arrows ({shown} drawn)"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="14" text-anchor="middle">',
        f"<title>{title}</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#7a8a99"/></marker></defs>',
    ]
    for room in sorted(drawn):
        for other in sorted(drawn[room]):
            a, b = boxes[room], boxes[other]
            y1, y2 = a.y + HEIGHT / 2, b.y - HEIGHT / 2
            bend = (y2 - y1) / 2
            parts.append(
                f'<path d="M{a.x:.0f} {y1:.0f}C{a.x:.0f} {y1 + bend:.0f} {b.x:.0f} {y2 - bend:.0f} {b.x:.0f} {y2:.0f}" '
                'fill="none" stroke="#7a8a99" stroke-width="1.3" marker-end="url(#tip)"/>'
            )
    for room, box in boxes.items():
        package, _, name = room.partition(".")
        left, up = box.x - BOX / 2, box.y - HEIGHT / 2
        parts += [
            f'<rect x="{left:.0f}" y="{up:.0f}" width="{BOX}" height="{HEIGHT}" rx="7" fill="{PACKAGES[package]}"/>',
            f'<text x="{box.x:.0f}" y="{box.y - 3:.0f}" fill="#fff" font-weight="bold">{escape(name)}</text>',
            f'<text x="{box.x:.0f}" y="{box.y + 14:.0f}" fill="#fff" font-size="11">{package}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def main() -> int:
    """Write the figure, or compare it with the imports if `--check` is given."""
    figure = draw(read_arrows())
    if "--check" not in sys.argv[1:]:
        FIGURE.write_text(figure, encoding="utf-8")
        return 0
    if FIGURE.read_text(encoding="utf-8") == figure:
        return 0
    print(f"{FIGURE} does not show the present imports; run: python {Path(__file__).name}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
