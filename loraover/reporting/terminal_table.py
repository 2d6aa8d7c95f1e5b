"""Tables on a terminal: where it is narrow, names and texts take several lines, and every other cell stays whole."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from loraover.common.errors import printable


def terminal_table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    names: Collection[str] = (),
    words: Collection[str] = (),
    title: str | None = None,
    caption: str | None = None,
) -> Table:
    """Make a table whose texts may quote a file: markup and control characters in them are not interpreted.

    Args:
        heads: Names of the columns.
        rows: Cells; a `Text` keeps its style.
        names: Columns of names and texts, which begin at the left and take several lines where there is little room.
        words: Columns of single words, which begin at the left. All others are of numbers, and end at the right.
        title: Text above the table.
        caption: Text below it.
    """
    shown_title, shown_caption = (None if text is None else escape(printable(text)) for text in (title, caption))
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), title=shown_title, caption=shown_caption)
    cells = [[cell if isinstance(cell, Text) else Text(printable(cell)) for cell in row] for row in rows]
    for k, head in enumerate(heads):
        if head in names:
            table.add_column(head, overflow="fold")
        else:
            width = max([*map(len, head.split("\n")), *(row[k].cell_len for row in cells)])
            table.add_column(head, justify="left" if head in words else "right", no_wrap=True, min_width=width)
    for row in cells:
        table.add_row(*row)
    return table
