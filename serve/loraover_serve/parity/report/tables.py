"""Tables of a parity report's page."""

from __future__ import annotations

from collections.abc import Sequence

from loraover.reporting.html_page import Table
from loraover_serve.engines.answers import BASE
from loraover_serve.parity.judge.analysis import QUANTILE_NAMES, Latency, Result
from loraover_serve.parity.report.parity_report import ParityReport
from loraover_serve.parity.samples import CONTROL, FOLDED, MIXED, SWITCHING, VANILLA

GIB, UNBOUNDED = 2**30, 1000.0


def arms_table(report: ParityReport) -> Table:
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
    arms = {sample.arm for run in report.runs for sample in run.samples}
    rows = [(arm, what) for arm, what in meanings.items() if arm in arms]
    return Table(("arm", "what it is"), rows, ("arm", "what it is"), ("what it is",))


def deciding_first(results: Sequence[Result]) -> list[Result]:
    """Return the ratios in another order: the folded arm's, the control's, and the base model's last.

    Args:
        results: The ratios.
    """
    turn = {FOLDED: 0, CONTROL: 1, BASE: 3}
    return sorted(results, key=lambda result: turn.get(result.arm, 2))


def ratios_table(report: ParityReport) -> Table:
    """Every ratio of times, those of the folded arm first and the base model's last."""
    rows = [
        (
            *(r.verdict, r.engine, str(r.concurrency), r.arm, r.measure, f"{r.ratio:.4f}"),
            *(" to ".join(map(end_text, ends)) for ends in (r.interval, r.adjusted_interval)),
            str(r.blocks),
        )
        for r in deciding_first(report.results)
    ]
    columns = (
        *("verdict", "engine", "at once", "arm", "measure", "ratio", "95 % interval", "adjusted interval"),
        "blocks",
    )
    return Table(columns, rows, ("verdict", "engine", "arm", "measure"))


def end_text(ratio: float, digits: int = 4) -> str:
    """Return the end of an interval of a ratio; few blocks can leave it without a limit.

    Args:
        ratio: The end.
        digits: Number of decimal places.
    """
    return f"{ratio:.{digits}f}" if ratio < UNBOUNDED else "infinity"


def latencies_table(report: ParityReport) -> Table:
    """Quantiles of all times, in milliseconds."""
    rows = [
        (*(f.engine, str(f.concurrency), f.arm, f.measure), *(_quantile(f, name) for name in QUANTILE_NAMES))
        for f in report.latencies
    ]
    return Table(("engine", "at once", "arm", "measure", *QUANTILE_NAMES), rows, ("engine", "arm", "measure"))


def memory_table(report: ParityReport) -> Table:
    """Peak memory of servers."""
    rows = [
        (
            *("vllm", str(m.concurrency), m.arm, ", ".join(f"{each / GIB:.3f}" for each in m.bytes)),
            "no interval" if m.interval is None else " to ".join(f"{end / GIB:.3f}" for end in m.interval),
        )
        for m in report.memory
    ]
    columns = ("engine", "at once", "arm", "GiB, each server", "95 % interval of the mean")
    return Table(columns, rows, ("engine", "arm"))


def answers_table(report: ParityReport) -> Table:
    """Answers of the folded adapter, the vanilla one and the base model beside PyTorch's."""
    rows = [
        (
            *(verdict, o.engine, str(o.concurrency), arm, d.reference, str(o.prompts), f"{100 * d.equal:.0f} %"),
            *(f"{d.largest_gap:.2g}", _nats(d.logprob_rms)),
        )
        for o in report.outputs
        for arm, d, verdict in o.rows()
    ]
    columns = (
        *("verdict", "engine", "at once", "arm", "compared with", "prompts", "equal texts", "largest gap"),
        "logprobs",
    )
    return Table(columns, rows, ("verdict", "engine", "arm", "compared with"))


def repeats_table(report: ParityReport) -> Table:
    """Equal texts of arms on the engine itself."""
    rows = [
        (
            *(o.engine, str(o.concurrency)),
            *(f"{100 * share:.0f} %" for share in (o.controls_equal, o.repeats_equal, o.vanilla_equal)),
            *(_nats(o.noise_rms), ", ".join(o.unapplied) or "none"),
        )
        for o in report.outputs
    ]
    columns = (
        *("engine", "at once", "vanilla and control", "folded, both times", "folded and vanilla", "noise"),
        "without effect",
    )
    return Table(columns, rows, ("engine", "without effect"))


def together_table(report: ParityReport) -> Table:
    """Answers of several adapters in turn, or in one batch."""
    rows = [
        (
            *("agrees" if t.agree else "too far", t.engine, str(t.concurrency), t.arm, t.adapter, str(t.prompts)),
            *(f"{100 * t.alone_equal:.0f} %", f"{t.distance.largest_gap:.2g}", _nats(t.distance.logprob_rms)),
        )
        for t in report.together
    ]
    columns = ("verdict", "engine", "at once", "arm", "adapter", "prompts", "equal texts", "largest gap", "logprobs")
    return Table(columns, rows, ("verdict", "engine", "arm", "adapter"), ("adapter",))


def cross_checks_table(report: ParityReport) -> Table:
    """Medians of vLLM's own benchmark beside ours."""
    rows = [(str(c.concurrency), c.arm, c.measure, _ms(c.ours), _ms(c.bench_serve)) for c in report.cross_checks]
    return Table(("at once", "arm", "measure", "ours", "bench serve"), rows, ("arm", "measure"))


def _quantile(found: Latency, name: str) -> str:
    low, high = found.intervals[name]
    return f"{_ms(found.quantiles[name])} [{_ms(low)}, {_ms(high)}]"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.{0 if seconds >= 1 else 1}f}"


def _nats(distance: float | None) -> str:
    return "-" if distance is None else f"{distance:.2g}"
