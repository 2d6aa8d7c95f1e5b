"""Figures of report pages, and model cards, whatever text they get."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from loraover.reporting.figures import Curve, FigureRow, Point, curves_figure, rows_figure
from loraover.reporting.model_card import model_card
from loraover.reporting.svg import Axis, Drawing, fitted, short
from loraover.reporting.table import plain

FINITE = st.floats(-1e9, 1e9, allow_nan=False)


@given(st.lists(FINITE, min_size=1, max_size=5))
def test_an_axis_has_room_for_all_values_and_few_round_numbers(values: list[float]) -> None:
    axis = Axis.around("x", values)
    assert all(-1e-6 <= axis.share(value) <= 1 + 1e-6 for value in values)
    assert len(axis.marks()) <= 8
    assert all(-1e-6 <= axis.share(value) <= 1 + 1e-6 for value, _ in axis.marks())


@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=5))
def test_a_logarithmic_axis_has_room_for_all_values(values: list[float]) -> None:
    axis = Axis.around("x", values, is_log=True)
    assert all(0 <= axis.share(value) <= 1 for value in values)
    assert len(axis.marks()) <= 12


def test_numbers_of_axes_are_round() -> None:
    assert [text for _, text in Axis("x", -6.2, 6.2).marks()] == ["-5", "0", "5"]
    assert [text for _, text in Axis("x", 3e-7, 0.5, is_log=True).marks()] == [
        *("1e-6", "1e-5", "0.0001", "0.001", "0.01", "0.1")
    ]
    assert [text for _, text in Axis("x", 0.9, 6, is_log=True).marks()] == ["1", "2", "5"]


def test_what_cannot_be_drawn_is_left_out() -> None:
    axis = Axis.around("x", [math.nan, math.inf, 1.0, 0.0], is_log=True)
    assert axis.low < 1 < axis.high


@pytest.mark.parametrize(("low", "high", "arrows"), [(-1, 1, 0), (-9, 1, 1), (-9, 9, 2)])
def test_intervals_that_leave_the_axis_end_in_arrows(low: float, high: float, arrows: int) -> None:
    drawn = rows_figure("f", "f", [FigureRow("a", "", [Point(0, "subject")], (low, high))], Axis("x", -2, 2))
    lines = re.findall(r'<polyline points="([^"]*)" style="fill:none;stroke:var\(--subject\)', drawn.svg)
    assert sum(len(line.split()) == 3 for line in lines) == arrows


def test_curves_of_one_colour_differ_in_dashes_and_marks() -> None:
    curves = [Curve(name, "subject", [(1, 1), (2, 2)]) for name in "ab"]
    drawn = curves_figure("f", "f", curves, Axis("x", 0, 3), Axis("y", 0, 3)).svg
    assert drawn.count("stroke-dasharray") == 1
    assert "<circle" in drawn
    assert "<polygon" in drawn


def test_a_text_that_does_not_fit_loses_its_middle() -> None:
    text = fitted("lora-over:decomposition=eigen:options={}", 100)
    assert len(text) < 16
    assert (text[0], text[-1]) == ("l", "}")
    assert "\N{HORIZONTAL ELLIPSIS}" in text
    assert fitted("short", 100) == "short"


def test_a_file_has_the_colours_of_paper_and_an_escaped_text() -> None:
    drawing = Drawing(10, 10)
    drawing.text(1, 1, "<a & b>")
    figure = drawing.figure("../../a b", "<title>")
    assert figure.name == "-a-b"
    assert "&lt;a &amp; b&gt;" in figure.file()
    assert "<title>&lt;title&gt;</title>" in figure.file()
    assert 'xmlns="http://www.w3.org/2000/svg"' in figure.file()


def test_a_text_that_looks_like_a_colour_stays_a_text() -> None:
    drawing = Drawing(100, 20)
    drawing.text(0, 10, "var(--zz) style='var(--zz)'")
    assert "var(--zz)" in drawing.figure("f", 'style="var(--zz)').file()


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize("values", [[-1e308, 1e308], [1e308], [5e-324, 1e308], [1e-320]])
def test_an_axis_of_extreme_values_can_be_drawn(values: list[float], is_log: bool) -> None:
    axis = Axis.around("x", values, is_log=is_log)
    assert axis.low < axis.high
    assert len(axis.marks()) <= 12
    assert all(math.isfinite(axis.share(value)) for value in values)


def test_small_figures_are_short() -> None:
    assert [short(value) for value in (None, 0.0, 1.234e-7, 0.1234)] == ["-", "0", "1.2e-7", "0.12"]


FACTS = {"method": "lora", "base model": "folder /models/base"}
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a | b || c",
    "a\n---\nlicense: mit\n---\n# Title",
    'a"\nlicense: mit\nx: "',
    "```\n# out of the code",
    "*bold* _it_ ~~gone~~ # head",
    "back\\slash\\",
    "a\r\n\r\n| b |\v\f\x85\u2028\u2029c",
    "<!-- hidden",
    "!!python/object/apply:os.system [ls]",
    "delete \x7f",
    "escape \x1b[31m bell \x07 null \x00",
    "\ufeffmark \u202eright to left",
    "",
]
TEXT = st.text(max_size=60) | st.text("<>[]()|`*_~#\\&;!\n\r-: '\"{}ab", max_size=60) | st.sampled_from(HOSTILE)


def split(card: str) -> tuple[Any, str]:
    """The front matter's values, and the Markdown behind it."""
    empty, front, body = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)
    assert empty == ""
    return yaml.safe_load(front), body


def lines(body: str) -> list[str]:
    """Lines as Markdown has them."""
    return re.split(r"\r\n|\r|\n", body)


def cells(row: str) -> list[str]:
    """Cells of one table row: an unescaped bar ends a cell, and a backslash escapes what follows it."""
    found = [""]
    escaped = False
    for character in row:
        if character == "|" and not escaped:
            found.append("")
        else:
            found[-1] += character
        escaped = character == "\\" and not escaped
    return found[1:-1]


class Tags(HTMLParser):
    """Collects everything in a text that HTML would not show as text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.found.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.found.append(tag)

    def handle_comment(self, data: str) -> None:
        self.found.append(data)

    def handle_decl(self, decl: str) -> None:
        self.found.append(decl)

    def handle_pi(self, data: str) -> None:
        self.found.append(data)

    def unknown_decl(self, data: str) -> None:
        self.found.append(data)


def shown(escaped: str) -> str:
    """What a reader sees of escaped text that holds no markup."""
    unescaped = re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", escaped)
    return unescaped.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def test_a_card_has_front_matter_facts_and_the_command() -> None:
    values, body = split(model_card("LoRA adapter", "owner/base", FACTS, "loraover train demo -o out"))
    assert values == {"base_model": "owner/base", "library_name": "peft", "tags": ["lora", "loraover"]}
    assert lines(body)[0] == "# LoRA adapter"
    assert "A plain LoRA adapter of owner/base; the base model's licence" in body
    assert "| method | lora |" in lines(body)
    assert "| base model | folder /models/base |" in lines(body)
    assert lines(body)[-4:] == ["```", "loraover train demo -o out", "```", ""]


def test_a_card_without_a_base_model_names_none() -> None:
    values, body = split(model_card("LoRA adapter", None, FACTS, "x"))
    assert "base_model" not in values
    assert "an unnamed base model" in body


@given(TEXT | st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@example("\N{GRINNING FACE}")
@example("\x85")
def test_front_matter_survives_any_base_model(text: str) -> None:
    values, _ = split(model_card("t", text, FACTS, "x"))
    assert values == {"base_model": text, "library_name": "peft", "tags": ["lora", "loraover"]}


@given(title=TEXT, base=TEXT, name=TEXT, value=TEXT, command=TEXT)
@example(title="t", base="b", name="n", value="v", command="# a comment, not a heading, inside the fence")
def test_hostile_text_changes_no_structure(title: str, base: str, name: str, value: str, command: str) -> None:
    _, body = split(model_card(title, base, {name: value}, command))
    tame = lines(split(model_card("t", "b", {"n": "v"}, "c"))[1])
    found = lines(body)
    assert len(found) == len(tame)
    opening = next(i for i, line in enumerate(found) if line == "```")
    assert [i for i, line in enumerate(found[:opening]) if line.startswith("#")] == [0]
    assert [i for i, line in enumerate(found) if "```" in line] == [i for i, line in enumerate(tame) if "```" in line]
    row = next(i for i, line in enumerate(tame) if line == "| n | v |")
    assert len(cells(found[row])) == 2
    assert Tags("\n".join(found[:opening])).found == []


@given(TEXT)
def test_escaped_text_shows_as_it_was(text: str) -> None:
    escaped = plain(text)
    assert shown(escaped) == " ".join(text.split())
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*_\[\]#|~]", escaped)
    assert not set("<>") & set(escaped)


@pytest.mark.parametrize("text", ["SmolLM2-135M", "hub owner/model@0123456789ab", "3,712", "0.0%", "before: 4.17 (4)"])
def test_harmless_text_is_left_alone(text: str) -> None:
    assert plain(text) == text


@given(st.dictionaries(st.sampled_from("abc"), TEXT))
def test_each_fact_is_one_row(facts: dict[str, str]) -> None:
    _, body = split(model_card("t", "b", facts, "x"))
    rows = [cells(line) for line in lines(body) if line.startswith("| ")][2:]
    assert [[shown(cell.strip()) for cell in row] for row in rows] == [
        [name, " ".join(value.split()).strip()] for name, value in facts.items()
    ]


@given(TEXT.filter(bool))
def test_a_licence_stands_in_front_matter_and_text_and_changes_no_structure(licence: str) -> None:
    _, tame = split(model_card("t", "owner/base", FACTS, "x", licence="mit"))
    values, body = split(model_card("t", "owner/base", FACTS, "x", licence=licence))
    assert values["license"] == licence
    assert shown(f"the base model's licence ({plain(licence)}) applies") in shown(body)
    assert len(lines(body)) == len(lines(tame))
    assert Tags(body.split("```")[0]).found == []
