"""Tables of reports, each declared once and shown on a terminal, on a page and in Markdown.

A column is a head, a function that gives a row's cell, and a kind. `console.print(table)` and `{{ table }}` in a
template of a page show it, with texts that may quote a file: no markup in them is interpreted.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from loraover.common.errors import printable
from loraover.reporting.palette import terminal_color, tone_of

if TYPE_CHECKING:
    import rich.table

Row = TypeVar("Row")
Kind = Literal["number", "word", "name", "verdict"]
_MARKDOWN = str.maketrans({c: f"\\{c}" for c in "\\`*_[]#|~"})


@dataclass(frozen=True)
class Column(Generic[Row]):
    """Column of a table.

    Args:
        head: Name of the column.
        cell: Function that gives the text of a row's cell.
        kind: "number", which ends at the right; "word", which begins at the left; "name", which takes several lines
            where there is little room; or "verdict", a word in the colour of its tone.
        brief: Function that gives a shorter text for a terminal; None means `cell`.
        is_wide: Whether the column is left out on a terminal, which has no room for it.
        verdict: Function that gives the verdict whose colour a cell of the kind "verdict" has; None means `cell`. An
            empty one has no colour.
    """

    head: str
    cell: Callable[[Row], str]
    kind: Kind = "number"
    brief: Callable[[Row], str] | None = None
    is_wide: bool = False
    verdict: Callable[[Row], str] | None = None

    def verdict_of(self, row: Row) -> str:
        """Return the verdict whose colour a row's cell has; empty if it has none."""
        return (self.verdict or self.cell)(row) if self.kind == "verdict" else ""


@dataclass(frozen=True)
class Table(Generic[Row]):
    """Table of a report.

    Args:
        title: Text above it.
        note: Explanation below it on a page.
        caption: Line below it on a terminal.
    """

    columns: Sequence[Column[Row]]
    rows: Sequence[Row]
    title: str = ""
    note: str = ""
    caption: str = ""

    def __rich__(self) -> rich.table.Table:
        """Return the table for a terminal: where it is narrow, only names take several lines."""
        from rich.box import SIMPLE
        from rich.markup import escape
        from rich.table import Table as Drawn
        from rich.text import Text

        title, caption = (escape(printable(text)) or None for text in (self.title, self.caption))
        drawn = Drawn(box=SIMPLE, padding=(0, 1, 0, 0), title=title, caption=caption)
        columns = [column for column in self.columns if not column.is_wide]
        cells = []
        for column in columns:
            texts = [Text(printable((column.brief or column.cell)(row))) for row in self.rows]
            for text, verdict in zip(texts, map(column.verdict_of, self.rows), strict=True):
                text.style = terminal_color(verdict) if verdict else ""
            cells.append(texts)
            lines = [printable(line) for line in column.head.split("\n")]
            head = escape("\n".join(lines))
            if column.kind == "name":
                drawn.add_column(head, overflow="fold")
            else:
                width = max(*map(len, lines), *(text.cell_len for text in texts), 0)
                justify: Any = "right" if column.kind == "number" else "left"
                drawn.add_column(head, justify=justify, no_wrap=True, min_width=width)
        for row in zip(*cells, strict=True):
            drawn.add_row(*row)
        return drawn

    def __html__(self) -> str:
        """Return the table for a page."""

        def classed(name: str, kind: str, text: str) -> str:
            attribute = f' class="{kind}"' if kind else ""
            return f"<{name}{attribute}>{html.escape(text)}</{name}>"

        heads = [classed("th", "n" if column.kind == "number" else "", column.head) for column in self.columns]
        rows = []
        for row in self.rows:
            cells = []
            for column in self.columns:
                verdict = column.verdict_of(row)
                kind = {"number": "n", "name": "long"}.get(column.kind, tone_of(verdict) if verdict else "")
                cells.append(classed("td", kind, column.cell(row)))
            rows.append(f"<tr>{''.join(cells)}</tr>\n")
        return (
            f'<div class="scroll" tabindex="0"><table><thead><tr>{"".join(heads)}</tr></thead>\n'
            f"<tbody>\n{''.join(rows)}</tbody></table></div>\n"
        )

    def markdown(self) -> str:
        """Return the table in Markdown, without its title."""
        marks = ["---:" if column.kind == "number" else "---" for column in self.columns]
        cells = [[plain(column.cell(row)) for column in self.columns] for row in self.rows]
        lines = [[plain(column.head) for column in self.columns], marks, *cells]
        return "\n".join(f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in line)}|" for line in lines)


def facts_table(
    facts: Sequence[tuple[str, str]], heads: tuple[str, str] = ("what", "value"), title: str = "", note: str = ""
) -> Table[tuple[str, str]]:
    """Return a table of names and values, with a title above it and, on a page, a note below it."""
    columns: list[Column[tuple[str, str]]] = [
        Column(heads[0], lambda fact: fact[0], "word"),
        Column(heads[1], lambda fact: fact[1], "name"),
    ]
    return Table(columns, facts, title, note)


def plain(text: str) -> str:
    """Escape a text from outside, so that it is safe in a line of Markdown or a cell of its tables."""
    return html.escape(" ".join(text.split()), quote=False).translate(_MARKDOWN)


def percent(share: float, digits: int = 0) -> str:
    """Return a share in per cent, such as "88 %"."""
    return f"{100 * share:.{digits}f} %"
