"""A parity report for people, on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loraover.reporting.palette import terminal_color
from loraover.reporting.reporter import print_line
from loraover.reporting.terminal_table import terminal_table
from loraover_serve.parity.judge.analysis import QUANTILE_NAMES, Latency, Result, Throughput
from loraover_serve.parity.judge.outputs import Distance, Outputs
from loraover_serve.parity.judge.several import Together
from loraover_serve.parity.report.parity_report import ParityReport
from loraover_serve.parity.report.tables import deciding_first, end_text
from loraover_serve.parity.request import ParityRequest

SHORT = {"time to first token": "first token", "time per output token": "per token", "end-to-end latency": "end to end"}
GIB = 2**30
WORDS = ("verdict", "arm", "time")


def show_report(report: ParityReport, request: ParityRequest, console: Console) -> None:
    """Print a report's tables, notes and verdict, and the output.

    Args:
        report: The report.
        request: What it answers.
        console: Where to print.
    """
    for table in _tables(report):
        console.print(table)
    for note in report.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)
    console.print(f"{report.verdict}: {escape(report.reason)}", style=terminal_color(report.verdict), soft_wrap=True)
    if request.output is not None:
        print_line(console, f"wrote {request.output}")


def _tables(report: ParityReport) -> Iterator[Table]:
    """Yield the table of ratios, which decides, and those of whatever else was measured."""
    yield _ratios_table(report)
    yield _latency_table(report)
    yield _rates_table(report)
    if report.memory:
        yield _memory_table(report)
    if report.cross_checks:
        yield _cross_check_table(report)
    if report.outputs:
        yield _outputs_table(report)
    if report.together:
        yield _together_table(report)


def _place(found: Result | Latency | Throughput | Outputs | Together) -> str:
    """Engine and concurrency, in one column."""
    return found.engine if found.concurrency == 1 else f"{found.engine}, {found.concurrency} at once"


def _ratios_table(report: ParityReport) -> Table:
    rows = [
        (
            *(r.verdict, _place(r), r.arm, SHORT[r.measure]),
            f"{r.ratio:.3f} [{', '.join(end_text(end, 3) for end in r.interval)}]",
        )
        for r in deciding_first(report.results)
    ]
    heads = ("verdict", "engine", "arm", "time", "ratio [95 %]")
    title = f"Time of each arm / time of the vanilla LoRA; equal within {100 * report.margin:g} %"
    return terminal_table(heads, rows, names=("engine",), words=WORDS, title=title)


def _latency_table(report: ParityReport) -> Table:
    rows = [
        (
            *(_place(found), found.arm, SHORT[found.measure]),
            *(f"{1000 * found.quantiles[name]:.1f}" for name in QUANTILE_NAMES),
        )
        for found in report.latencies
        if found.measure in SHORT
    ]
    heads = ("engine", "arm", "time", *QUANTILE_NAMES)
    return terminal_table(heads, rows, names=("engine",), words=WORDS, title="Latencies, milliseconds")


def _rates_table(report: ParityReport) -> Table:
    rows = [
        (_place(t), t.arm, f"{t.tokens_per_second:.1f} [{t.interval[0]:.1f}, {t.interval[1]:.1f}]")
        for t in report.throughputs
    ]
    heads, title = ("engine", "arm", "tokens/s [95 %]"), "Throughput, tokens per second"
    return terminal_table(heads, rows, names=("engine",), words=WORDS, title=title)


def _memory_table(report: ParityReport) -> Table:
    rows = [
        (*("vllm", str(m.concurrency), m.arm, str(len(m.bytes))), f"{fmean(m.bytes) / GIB:.2f} {_ends(m.interval)}")
        for m in report.memory
    ]
    heads, title = ("engine", "at once", "arm", "servers", "mean [95 %]"), "Peak memory of a server with one arm, GiB"
    return terminal_table(heads, rows, names=("engine",), words=WORDS, title=title)


def _ends(interval: tuple[float, float] | None) -> str:
    return "[no interval]" if interval is None else f"[{interval[0] / GIB:.2f}, {interval[1] / GIB:.2f}]"


def _cross_check_table(report: ParityReport) -> Table:
    rows = [
        (*(str(c.concurrency), c.arm, SHORT[c.measure]), f"{1000 * c.ours:.1f}", f"{1000 * c.bench_serve:.1f}")
        for c in report.cross_checks
    ]
    heads, title = ("at once", "arm", "time", "ours", "bench serve"), "Medians beside vllm bench serve's, milliseconds"
    return terminal_table(heads, rows, words=WORDS, title=title)


def _outputs_table(report: ParityReport) -> Table:
    rows = [
        (*(verdict, _place(o), arm, f"{d.equal:.0%}", f"{d.largest_gap:.1e}"), _rms(d))
        for o in report.outputs
        for arm, d, verdict in o.rows()
    ]
    heads = ("verdict", "engine", "arm", "equal texts", "largest gap", "logprobs")
    title = "Distance of answers from PyTorch's, nats (logprobs: RMS)"
    return terminal_table(heads, rows, names=("engine",), words=WORDS, title=title)


def _together_table(report: ParityReport) -> Table:
    rows = [
        ("agrees" if t.agree else "too far", _place(t), t.arm, t.adapter, f"{t.alone_equal:.0%}", _rms(t.distance))
        for t in report.together
    ]
    heads = ("verdict", "engine", "arm", "adapter", "equal texts", "logprobs")
    title = "Answers of several adapters, beside each alone"
    return terminal_table(heads, rows, names=("engine", "adapter"), words=WORDS, title=title)


def _rms(distance: Distance) -> str:
    return "-" if distance.logprob_rms is None else f"{distance.logprob_rms:.1e}"
