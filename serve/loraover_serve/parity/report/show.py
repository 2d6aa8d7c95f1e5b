"""A parity report for people, on a terminal."""

from __future__ import annotations

from statistics import fmean

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loraover.reporting.reporter import print_line
from loraover_serve.parity.judge.analysis import QUANTILE_NAMES, Latency, Result, Throughput
from loraover_serve.parity.judge.outputs import Outputs
from loraover_serve.parity.judge.several import Together
from loraover_serve.parity.report.parity_report import ParityReport
from loraover_serve.parity.report.tables import deciding_first
from loraover_serve.parity.request import ParityRequest

SHORT = {"time to first token": "first token", "time per output token": "per token", "end-to-end latency": "end to end"}
GIB = 2**30
COLORS = {"equivalent": "green", "different": "red", "failed": "red", "inconclusive": "yellow"}


def show_report(report: ParityReport, request: ParityRequest, console: Console) -> None:
    """Print a report's tables, notes and verdict, and the output.

    Args:
        report: The report.
        request: What it answers.
        console: Where to print.
    """
    table = Table(
        box=SIMPLE,
        padding=(0, 1, 0, 0),
        title=f"Time of each arm / time of the vanilla LoRA; equal within {100 * report.margin:g} %",
    )
    for column in ("engine", "arm", "time", "ratio [95 %]", "verdict"):
        table.add_column(column, no_wrap=True)
    for r in deciding_first(report.results):
        low, high = r.interval
        ratio = f"{r.ratio:.3f} [{low:.3f}, {high:.3f}]"
        table.add_row(_place(r), r.arm, SHORT[r.measure], ratio, r.verdict)
    console.print(table)
    console.print(_latency_table(report))
    rates = Table(box=SIMPLE, title="Throughput, tokens per second")
    for column in ("engine", "arm", "tokens/s [95 %]"):
        rates.add_column(column)
    for t in report.throughputs:
        low, high = t.interval
        rates.add_row(_place(t), t.arm, f"{t.tokens_per_second:.1f} [{low:.1f}, {high:.1f}]")
    console.print(rates)
    if report.memory:
        console.print(_memory_table(report))
    if report.cross_checks:
        console.print(_cross_check_table(report))
    if report.outputs:
        console.print(_outputs_table(report))
    if report.together:
        console.print(_together_table(report))
    for note in report.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)
    console.print(f"{report.verdict}: {escape(report.reason)}", style=COLORS[report.verdict], soft_wrap=True)
    if request.output is not None:
        print_line(console, f"wrote {request.output}")


def _place(found: Result | Latency | Throughput | Outputs | Together) -> str:
    """Engine and concurrency, in one column."""
    return found.engine if found.concurrency == 1 else f"{found.engine}, {found.concurrency} at once"


def _latency_table(report: ParityReport) -> Table:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), title="Latencies, milliseconds")
    for column in ("engine", "arm", "time", *QUANTILE_NAMES):
        table.add_column(column, no_wrap=True)
    for latency in report.latencies:
        if latency.measure in SHORT:
            times = (f"{1000 * latency.quantiles[name]:.1f}" for name in QUANTILE_NAMES)
            table.add_row(_place(latency), latency.arm, SHORT[latency.measure], *times)
    return table


def _memory_table(report: ParityReport) -> Table:
    table = Table(box=SIMPLE, title="Peak memory of a server with one arm alone, GiB")
    for column in ("engine", "at once", "arm", "servers", "mean [95 %]"):
        table.add_column(column)
    for m in report.memory:
        low, high = m.interval or (0.0, 0.0)
        shown = "[no interval]" if m.interval is None else f"[{low / GIB:.2f}, {high / GIB:.2f}]"
        mean = fmean(m.bytes) / GIB
        table.add_row("vllm", str(m.concurrency), m.arm, str(len(m.bytes)), escape(f"{mean:.2f} {shown}"))
    return table


def _cross_check_table(report: ParityReport) -> Table:
    table = Table(box=SIMPLE, title="Medians of vllm bench serve beside ours, milliseconds")
    for column in ("at once", "arm", "time", "ours", "bench serve"):
        table.add_column(column)
    for c in report.cross_checks:
        table.add_row(
            str(c.concurrency), c.arm, SHORT[c.measure], f"{1000 * c.ours:.1f}", f"{1000 * c.bench_serve:.1f}"
        )
    return table


def _outputs_table(report: ParityReport) -> Table:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), title="Distance of answers from PyTorch's, nats (logprobs: RMS)")
    for column in ("engine", "arm", "equal texts", "largest gap", "logprobs", "verdict"):
        table.add_column(column, no_wrap=True)
    for o in report.outputs:
        for arm, d, verdict in o.rows():
            rms = "-" if d.logprob_rms is None else f"{d.logprob_rms:.1e}"
            table.add_row(_place(o), arm, f"{d.equal:.0%}", f"{d.largest_gap:.1e}", rms, verdict)
    return table


def _together_table(report: ParityReport) -> Table:
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), title="Answers of several adapters, beside each alone")
    for column in ("engine", "arm", "adapter", "equal texts", "logprobs", "verdict"):
        table.add_column(column, no_wrap=True)
    for t in report.together:
        rms = "-" if t.distance.logprob_rms is None else f"{t.distance.logprob_rms:.1e}"
        verdict = "agrees" if t.agree else "too far"
        table.add_row(_place(t), t.arm, t.adapter, f"{t.alone_equal:.0%}", rms, verdict)
    return table
