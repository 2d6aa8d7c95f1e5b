"""Figures of reports: axes, texts that would not fit, and intervals that leave the axis."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraover.reporting.figures import Curve, FigureRow, Point, curves_figure, rows_figure
from loraover.reporting.svg import Axis, Drawing, fitted, short

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
