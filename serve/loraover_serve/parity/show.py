"""A parity report for people, on a terminal."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loraover_serve.parity.report import ParityReport

SHORT = {"time per output token": "per token", "end-to-end latency": "end to end"}
COLORS = {"equivalent": "green", "different": "red", "failed": "red", "inconclusive": "yellow"}


def show_report(report: ParityReport, console: Console) -> None:
    """Ratios with their intervals, throughput, outputs, verdict."""
    table = Table(
        box=SIMPLE, padding=(0, 1, 0, 0), title=f"Times, arm / vanilla LoRA; equal within {report.margin:.0%}"
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
    for o in report.outputs:
        distance = "" if o.logprob_rms is None else f"; logprobs {o.logprob_rms:.1e} nats off (rms)"
        noise = "" if o.logprob_noise is None else f", the base model's {o.logprob_noise:.1e}"
        console.print(
            f"{o.engine}, {o.prompts} prompts: {o.reference_equal:.0%} equal {o.reference}{distance}{noise}; "
            f"{o.controls_equal:.0%} equal between two copies of one adapter",
            soft_wrap=True,
        )
    console.print(f"{report.verdict}: {escape(report.reason)}", style=COLORS[report.verdict], soft_wrap=True)
