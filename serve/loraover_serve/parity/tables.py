"""Tables of a parity report, which a terminal and its page show."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.markup import escape

from loraover.reporting.palette import terminal_color
from loraover.reporting.reporter import print_line
from loraover.reporting.svg import short
from loraover.reporting.table import Column, Table, facts_table, percent
from loraover_serve.judge.limits import BASE
from loraover_serve.parity.answers import Distance, Outputs, Together
from loraover_serve.parity.report import PER, ParityReport, end_text
from loraover_serve.parity.request import ParityRequest
from loraover_serve.parity.samples import CONTROL, FOLDED, MIXED, SWITCHING, VANILLA
from loraover_serve.parity.servers import CrossCheck, PeakMemory
from loraover_serve.parity.statistics import QUANTILE_NAMES, Latency, Result, Throughput

GIB = 2**30


def show_report(report: ParityReport, request: ParityRequest, console: Console) -> None:
    """Print a report's tables, notes and verdict, and the output.

    Args:
        request: Request that the report answers.
        console: Where to print.
    """
    for table in (ratios, latencies, throughputs, memory, cross_checks, answers, together):
        if (found := table(report)).rows:
            console.print(found)
    for note in report.notes:
        console.print(f"note: {escape(note)}", soft_wrap=True)
    console.print(f"{report.verdict}: {escape(report.reason)}", style=terminal_color(report.verdict), soft_wrap=True)
    if request.output is not None:
        print_line(console, f"wrote {request.output}")


def _place(engine: str, concurrency: int) -> str:
    return engine if concurrency == 1 else f"{engine}, {concurrency} at once"


ENGINE: Column[Any] = Column("engine", lambda found: _place(found.engine, found.concurrency), "name")
VLLM: Column[Any] = Column("engine", lambda found: _place("vllm", found.concurrency), "name")
ARM: Column[Any] = Column("arm", lambda found: found.arm, "word")
TIME: Column[Any] = Column("time", lambda found: found.measure, "word", brief=lambda found: PER[found.measure])


def deciding_first(results: Sequence[Result]) -> list[Result]:
    """Return the ratios in another order: the folded arm's, the control's, and the base model's last."""
    turn = {FOLDED: 0, CONTROL: 1, BASE: 3}
    return sorted(results, key=lambda result: turn.get(result.arm, 2))


def ratios(report: ParityReport) -> Table[Result]:
    """Every ratio of times, those of the folded arm first and the base model's last."""

    def ends(interval: tuple[float, float]) -> str:
        return f"[{', '.join(end_text(end, 3) for end in interval)}]"

    return Table(
        [
            Column("verdict", lambda r: r.verdict, "word"),
            *(ENGINE, ARM, TIME),
            Column("ratio [95 %]", lambda r: f"{r.ratio:.3f} {ends(r.interval)}"),
            Column("adjusted interval", lambda r: ends(r.adjusted_interval), is_wide=True),
            Column("blocks", lambda r: str(r.blocks), is_wide=True),
        ],
        deciding_first(report.results),
        f"Time of each arm / time of the vanilla LoRA; equal within {100 * report.margin:g} %",
        "The adjusted interval is wider, because several comparisons are made at once (Holm's correction). An arm is "
        "different if its adjusted interval lies beyond the margin.",
    )


def latencies(report: ParityReport) -> Table[Latency]:
    """Quantiles of all times."""

    def ms(seconds: float) -> str:
        return f"{1000 * seconds:.{0 if seconds >= 1 else 1}f}"

    def quantile(name: str) -> Column[Latency]:
        return Column(
            name,
            lambda found: f"{ms(found.quantiles[name])} [{', '.join(map(ms, found.intervals[name]))}]",
            brief=lambda found: ms(found.quantiles[name]),
        )

    columns = [ENGINE, ARM, TIME, *map(quantile, QUANTILE_NAMES)]
    note = "Quantiles with their 95 % intervals."
    return Table(columns, report.latencies, "Latencies, milliseconds", note)


def throughputs(report: ParityReport) -> Table[Throughput]:
    """Tokens per second of every arm."""
    rate: Column[Throughput] = Column(
        "tokens/s [95 %]", lambda t: f"{t.tokens_per_second:.1f} [{t.interval[0]:.1f}, {t.interval[1]:.1f}]"
    )
    return Table([ENGINE, ARM, rate], report.throughputs, "Throughput, tokens per second")


def memory(report: ParityReport) -> Table[PeakMemory]:
    """Peak memory of servers."""

    def mean(m: PeakMemory) -> str:
        ends = "no interval" if m.interval is None else ", ".join(f"{end / GIB:.2f}" for end in m.interval)
        return f"{fmean(m.bytes) / GIB:.2f} [{ends}]"

    return Table(
        [
            *(VLLM, ARM),
            Column("servers", lambda m: str(len(m.bytes))),
            Column("mean [95 %]", mean),
            Column("each server", lambda m: ", ".join(f"{each / GIB:.3f}" for each in m.bytes), is_wide=True),
        ],
        report.memory,
        "Peak memory of a server with one arm, GiB",
        "Memory of all processes of the server, from its start. Three servers or more have a 95 % interval of their "
        "mean. The verdict does not depend on memory.",
    )


def cross_checks(report: ParityReport) -> Table[CrossCheck]:
    """Medians of vLLM's own benchmark beside ours."""
    return Table(
        [
            *(VLLM, ARM, TIME),
            Column("ours", lambda c: f"{1000 * c.ours:.1f}"),
            Column("bench serve", lambda c: f"{1000 * c.bench_serve:.1f}"),
        ],
        report.cross_checks,
        "Medians beside vllm bench serve's, milliseconds",
        "Both ran on the same server and prompts. vLLM's benchmark runs one arm after the other. A drift of the "
        "machine looks like a difference of arms there. It asks for no logprobs.",
    )


def answers(report: ParityReport) -> Table[tuple[Outputs, str, Distance, str]]:
    """Answers of the folded adapter, the vanilla one and the base model beside PyTorch's."""
    return Table(
        [
            Column("verdict", lambda row: row[3], "word"),
            Column("engine", lambda row: _place(row[0].engine, row[0].concurrency), "name"),
            Column("arm", lambda row: row[1], "word"),
            Column("compared with", lambda row: row[2].reference, "word", is_wide=True),
            Column("prompts", lambda row: str(row[0].prompts), is_wide=True),
            Column("equal texts", lambda row: percent(row[2].equal)),
            Column("largest gap", lambda row: short(row[2].largest_gap)),
            Column("logprobs", lambda row: short(row[2].logprob_rms)),
        ],
        [(outputs, *row) for outputs in report.outputs for row in outputs.rows()],
        "Distance of answers from PyTorch's, nats",
        "The engine's greedy answers are compared with those of a model in PyTorch. Equal texts: the share of prompts "
        "with the same tokens. The gap is the difference of the two tokens' logits where an answer first differs. "
        "Logprobs: the RMS difference of the tokens' logprobs. The vanilla adapter's row is the noise floor: its "
        "distance has nothing to do with folding. The folded adapter agrees if its distance is not larger, within the "
        "error of so few tokens. The noise of the base model has to explain the floor. If it does not, the engine "
        "applies adapters wrongly.",
    )


def repeats(report: ParityReport) -> Table[Outputs]:
    """Shares of equal texts between the arms of one engine."""
    return Table(
        [
            ENGINE,
            Column("vanilla and control", lambda o: percent(o.controls_equal)),
            Column("folded, both times", lambda o: percent(o.repeats_equal)),
            Column("folded and vanilla", lambda o: percent(o.vanilla_equal)),
            Column("noise", lambda o: short(o.noise_rms)),
            Column("without effect", lambda o: ", ".join(o.unapplied) or "none", "word"),
        ],
        report.outputs,
        "Equal texts on the engine itself",
        "The first three numbers are shares of prompts with equal texts. Vanilla and control are two copies of one "
        "adapter. The noise is the RMS difference between their logprobs, in nats. An adapter has no effect if its "
        "answers are the base model's. It has none either if PyTorch's base model is nearer than its adapter.",
    )


def together(report: ParityReport) -> Table[Together]:
    """Answers of several adapters in turn, or in one batch."""
    return Table(
        [
            Column("verdict", lambda t: "agrees" if t.agree else "too far", "word"),
            *(ENGINE, ARM),
            Column("adapter", lambda t: t.adapter, "name"),
            Column("prompts", lambda t: str(t.prompts), is_wide=True),
            Column("equal texts", lambda t: percent(t.alone_equal)),
            Column("largest gap", lambda t: short(t.distance.largest_gap), is_wide=True),
            Column("logprobs", lambda t: short(t.distance.logprob_rms)),
        ],
        report.together,
        "Answers of several adapters at once, compared with each alone",
        "Equal texts: the share of prompts that the adapter alone answers with the same tokens. Logprobs: the RMS "
        "difference from the adapter in PyTorch, in nats. The adapter agrees if that is within the noise floor above.",
    )


def arms(report: ParityReport) -> Table[tuple[str, str]]:
    """Descriptions of the arms."""
    others = ", ".join(place for name, place in report.adapters.items() if name.startswith("adapter"))
    meanings = {
        FOLDED: f"the folded adapter, which the verdict is about: {report.adapters.get(FOLDED)}",
        VANILLA: f"a plain LoRA, the baseline: {report.adapters.get(VANILLA)}",
        CONTROL: "a second copy of the vanilla adapter, which shows the noise of this machine",
        BASE: "the base model without an adapter",
        SWITCHING: f"the folded adapter and {others}, one wave of requests after the other",
        MIXED: "the same adapters, whose requests share every batch",
        "unfolded": "the checkpoint that was folded, as training computes it",
    }
    found = {sample.arm for run in report.runs for sample in run.samples}
    return facts_table(
        [(arm, meaning) for arm, meaning in meanings.items() if arm in found],
        ("arm", "what it is"),
        "What was compared",
        "All arms answer the same prompts on one engine, in blocks. A block runs every arm twice, in a random order "
        "and then in the reverse of it. So a slow drift of the machine changes all arms alike.",
    )
