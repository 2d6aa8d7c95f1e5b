"""A plan as one HTML page that needs no network, with a histogram of the examples' lengths."""

from __future__ import annotations

from importlib.resources import files

from loraover.common.provenance import environment, hardware, today
from loraover.reporting.figures import Band, FigureRow, rows_figure
from loraover.reporting.html_page import Origin, Page, Verdict, make_page
from loraover.reporting.svg import Axis, Figure
from loraover.reporting.table import facts_table
from loraover.training.plan import ASSUMPTION, TrainingPlan
from loraover.training.rows.lengths import FEW
from loraover.training.run_result import Lengths

TEMPLATE = "plan.html.j2"


def to_page(plan: TrainingPlan, command: str) -> Page:
    """Make the page of a plan; every text is escaped.

    Args:
        plan: The plan.
        command: Command line that makes the page.
    """
    facts, lengths = plan.facts(with_bars=False) | {"estimate": ASSUMPTION}, plan.lengths
    sentence = f"The run takes {plan.steps:,} steps of {plan.method}. Memory in all: {facts['in all']}."
    if plan.fits is not None:
        sentence += f" It {plan.verdict.partition(';')[0]}."
    if lengths is not None:
        sentence += f" max_length {lengths.max_length:,} cuts {lengths.cut:,} of {lengths.examples:,} examples."
    is_open = plan.fits is False or (lengths is not None and lengths.cut_share > FEW)
    return make_page(
        files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"),
        title="Plan",
        heading="What will the run need?",
        verdict=Verdict("open" if is_open else "plain", "plan", sentence),
        facts={"base model": plan.model},
        origin=Origin(command, today(), hardware(), environment()),
        figures=[] if lengths is None else [_histogram(lengths)],
        table=facts_table(list(facts.items())),
    )


def _histogram(lengths: Lengths) -> Figure:
    """Draw a bar for each range of lengths."""
    rows = [
        FigureRow(f"up to {edge:,} tokens", f"{count:,}", bands=[Band(0, count, "other")])
        for edge, count in lengths.histogram.items()
    ]
    most = max(lengths.histogram.values())
    return rows_figure("lengths", "Number of examples by their length", rows, Axis("examples", 0, most))
