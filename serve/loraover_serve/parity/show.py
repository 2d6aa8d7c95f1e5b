"""A parity report for people, on a terminal."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loraover_serve.parity.report import ParityReport

SHORT = {"time to first token": "first token", "time per output token": "per token", "end-to-end latency": "end to end"}
GIB = 2**30
COLORS = {"equivalent": "green", "different": "red", "failed": "red", "inconclusive": "yellow"}


def show_report(report: ParityReport, console: Console) -> None:
    """Ratios with their intervals, throughput, outputs, verdict."""
    table = Table(
        box=SIMPLE, padding=(0, 1, 0, 0), title=f"Times, arm / vanilla LoRA; equal within {100 * report.margin:g} %"
    )
    for column in ("engine", "x", "arm", "time", "ratio [95 %]", "verdict"):
        table.add_column(column, no_wrap=True)
    for r in report.results:
        low, high = r.interval
        ratio = f"{r.ratio:.3f} [{low:.3f}, {high:.3f}]"
        table.add_row(r.engine, str(r.concurrency), r.arm, SHORT[r.measure], ratio, r.verdict)
    console.print(table)
    rates = Table(box=SIMPLE, title="Throughput, tokens per second, median of waves")
    for column in ("engine", "x", "arm", "tokens/s [95 %]"):
        rates.add_column(column)
    for t in report.throughputs:
        low, high = t.interval
        rates.add_row(t.engine, str(t.concurrency), t.arm, f"{t.tokens_per_second:.1f} [{low:.1f}, {high:.1f}]")
    console.print(rates)
    if report.memory:
        console.print(_memory_table(report))
    if report.cross_checks:
        console.print(_cross_check_table(report))
    if report.outputs:
        console.print(_outputs_table(report))
    console.print(f"{report.verdict}: {escape(report.reason)}", style=COLORS[report.verdict], soft_wrap=True)


def _memory_table(report: ParityReport) -> Table:
    table = Table(box=SIMPLE, title="Peak memory of a server with one arm, GiB (lowest to highest)")
    for column in ("engine", "x", "arm", "peak"):
        table.add_column(column)
    for m in report.memory:
        low, high = min(m.bytes) / GIB, max(m.bytes) / GIB
        table.add_row(
            "vllm", str(m.concurrency), m.arm, f"{low:.2f} to {high:.2f}" if len(m.bytes) > 1 else f"{low:.2f}"
        )
    return table


def _cross_check_table(report: ParityReport) -> Table:
    table = Table(box=SIMPLE, title="Medians beside those of vllm bench serve, milliseconds")
    for column in ("x", "arm", "time", "ours", "bench serve"):
        table.add_column(column)
    for c in report.cross_checks:
        table.add_row(
            str(c.concurrency), c.arm, SHORT[c.measure], f"{1000 * c.ours:.1f}", f"{1000 * c.bench_serve:.1f}"
        )
    return table


def _outputs_table(report: ParityReport) -> Table:
    table = Table(box=SIMPLE, title="Answers against PyTorch's: nats where texts part, and logprobs (rms)")
    for column in ("engine", "arm", "in PyTorch", "equal", "gap", "logprobs", "verdict"):
        table.add_column(column)
    for o in report.outputs:
        for arm, d in (("folded", o.folded), ("vanilla", o.vanilla)):
            rms = "-" if d.logprob_rms is None else f"{d.logprob_rms:.1e}"
            verdict = ("agrees" if o.agree else "apart") if arm == "folded" else "the floor"
            table.add_row(o.engine, arm, d.reference, f"{d.equal:.0%}", f"{d.largest_gap:.1e}", rms, verdict)
    return table
