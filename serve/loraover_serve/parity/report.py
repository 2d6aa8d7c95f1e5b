"""The report of a parity run, `parity.json`, and its verdict in plain sentences with their figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from loraover.common.strict_json import StrictModel
from loraover.reporting.html_page import Verdict
from loraover.reporting.palette import tone_of
from loraover_serve.judge.limits import BASE
from loraover_serve.parity.answers import Outputs, Together
from loraover_serve.parity.samples import CONTROL, FOLDED, Measurement
from loraover_serve.parity.servers import CrossCheck, PeakMemory
from loraover_serve.parity.statistics import Latency, Result, Throughput, requests_needed

REPORT_FILE = "parity.json"
EngineVerdict = Literal["equivalent", "different", "inconclusive", "failed"]
EXIT_CODES = {"equivalent": 0, "different": 1, "inconclusive": 3, "failed": 2}
PER = {
    "time to first token": "first token",
    "time per output token": "per token",
    "inter-token latency": "between tokens",
    "end-to-end latency": "per answer",
}
"""Short names of the measures."""

UNBOUNDED = 1000.0
"""Ratio from which on an end of an interval counts as infinite; few blocks can leave it without a limit."""


class ParityReport(StrictModel):
    """Contents of `parity.json`; after a failure, everything that was measured before it."""

    schema_version: int = 3
    verdict: EngineVerdict = Field(description="Verdict on the folded adapter against the vanilla one")
    reason: str = Field(description="Reason for the verdict, in words")
    margin: float = Field(description="Largest difference of times that still counts as equal, as a share")
    alpha: float = Field(description="Level of significance of the tests")
    results: list[Result]
    latencies: list[Latency]
    throughputs: list[Throughput]
    memory: list[PeakMemory]
    outputs: list[Outputs]
    together: list[Together] = Field(
        default=[], description="Answers of several adapters in turn or in one batch, beside each adapter's alone"
    )
    cross_checks: list[CrossCheck]
    notes: list[str] = Field(description="Failures of measurements that the verdict does not depend on")
    runs: list[Measurement] = Field(description="Samples of every engine at every concurrency")
    base_model: str = Field(description="Name or folder of the base model")
    adapters: dict[str, str] = Field(description="Folder or origin of each arm's adapter")
    workload: dict[str, str | int] = Field(description="Kind, number and lengths of the requests")
    device: str = Field(default="cpu", description="Device that PyTorch ran on: cpu, cuda, cuda:1 or mps")
    compute_dtype: str = Field(default="fp32", description="Data type that PyTorch ran in: fp32, bf16, fp16 or fp64")
    seed: int
    command: str = Field(description="Command line that makes the same measurement")
    versions: dict[str, str] = Field(description="Versions of packages and engines")
    hardware: str = Field(description="Processor, memory and system")
    date: str = Field(description="Day of the measurement, in UTC")
    kept: Path | None = Field(
        default=None, exclude=True, description="Folder of vLLM's logs, after a failure without an output; not in files"
    )

    @property
    def exit_code(self) -> int:
        """0 equivalent, 1 different, 3 inconclusive, 2 failed."""
        return EXIT_CODES[self.verdict]


def verdict_of(report: ParityReport) -> Verdict:
    """Return the verdict of a report in one or two plain sentences with their figures."""
    speed, answers, cost = _speed(report), _answers(report), _cost(report.results)
    are_wrong = not all([o.agree for o in report.outputs] + [t.agree for t in report.together])
    parts = (answers, speed, cost) if are_wrong else (speed, answers, cost)
    if report.verdict == "failed":
        stopped = report.reason if report.reason.endswith((".", "!")) else f"{report.reason}."
        are_sound = not any(outputs.unapplied or outputs.misapplied for outputs in report.outputs)
        before = ("Before that:", *parts) if are_sound and speed else ()
        parts = (f"The measurement failed: {stopped}", *before)
    return Verdict(tone_of(report.verdict), report.verdict, " ".join(filter(None, parts)))


def deciding(results: Sequence[Result], arm: str) -> Result | None:
    """Return the comparison of an arm that decides: one of the worst verdict, and of these the furthest from equal."""
    order = ("different", "inconclusive", "equivalent")
    mine = [result for result in results if result.arm == arm]
    worst = next((verdict for verdict in order if any(r.verdict == verdict for r in mine)), None)
    return max(
        (result for result in mine if result.verdict == worst),
        key=lambda result: abs(math.log(result.ratio)),
        default=None,
    )


def _speed(report: ParityReport) -> str:
    folded, control = (deciding(report.results, arm) for arm in (FOLDED, CONTROL))
    if folded is None or control is None:
        return ""
    several = len({(r.engine, r.concurrency) for r in report.results}) > 1
    margin = f"{100 * report.margin:g} %"
    if control.verdict != "equivalent":
        copies, interval = f"Two copies of one adapter differ by {change(control)}", _interval(control, several)
        if control.verdict == "different":
            return f"This machine is too noisy to compare. {copies}, beyond {margin}. {interval}"
        unknown = f"Too short to tell, or this machine is too noisy. {copies}, not surely within {margin}."
        return f"{unknown} {interval} {_needed(report)}"
    figures, interval = change(folded), _interval(folded, several)
    if folded.verdict == "equivalent":
        return f"Same speed as plain LoRA within {margin}: {'at most ' if several else ''}{figures}. {interval}"
    if folded.verdict == "different":
        word = "Slower" if folded.ratio > 1 else "Faster"
        return f"{word} than plain LoRA by more than {margin}: {figures}. {interval}"
    unknown = f"Too short to tell whether it is as fast as plain LoRA within {margin}."
    return f"{unknown} Measured: {figures}. {interval} {_needed(report)}"


def change(result: Result) -> str:
    """Return a difference of times, such as "+0.5 % per token"."""
    return f"{percent_text(result.ratio)} % {PER[result.measure]}"


def percent_text(ratio: float) -> str:
    """Return by how many per cent a ratio differs from 1, such as "+0.5"; an end of an interval may be infinite."""
    return f"{100 * (ratio - 1):+.1f}" if ratio < UNBOUNDED else "infinity"


def end_text(ratio: float, digits: int) -> str:
    """Return the end of an interval of a ratio, with a number of decimal places."""
    return f"{ratio:.{digits}f}" if ratio < UNBOUNDED else "infinity"


def _interval(result: Result, with_engine: bool) -> str:
    where = f" ({result.engine}, {at_once(result.concurrency)})" if with_engine else ""
    return f"The 95 % interval is {' to '.join(map(percent_text, result.interval))}{where}."


def at_once(concurrency: int) -> str:
    """Return a concurrency in words."""
    return "one request at a time" if concurrency == 1 else f"{concurrency} requests at once"


def _needed(report: ParityReport) -> str:
    text = requests_needed(report.results)
    return f"{text[0].upper()}{text[1:]}."


def _answers(report: ParityReport) -> str:
    """Return how the folded adapter's answers compare with PyTorch's; empty if they were not compared."""
    if not report.outputs:
        return ""
    prompts = sum(outputs.prompts for outputs in report.outputs)
    equal = sum(round(outputs.folded.equal * outputs.prompts) for outputs in report.outputs)
    exact = f"{equal} of {prompts} answers match PyTorch exactly."
    far = next((outputs for outputs in report.outputs if not outputs.agree), None)
    if far is not None:
        folded, vanilla = far.folded, far.vanilla
        if folded.logprob_rms is None or vanilla.logprob_rms is None:
            apart = f"a gap of {folded.largest_gap:.2g} nats, with plain LoRA by {vanilla.largest_gap:.2g}"
        else:
            apart = f"{folded.logprob_rms:.2g} nats, with plain LoRA by {vanilla.logprob_rms:.2g}"
        return f"{exact} With the folded adapter, {far.engine} is off by {apart}."
    parted = next((t for t in report.together if not t.agree), None)
    if parted is not None:
        return f"{exact} Beside other adapters ({parted.arm}), {parted.engine} answers wrongly for {parted.adapter}."
    return exact


def _cost(results: Sequence[Result]) -> str:
    """Return what plain LoRA costs beside the base model, per token; empty if that was not measured.

    It was not where two copies of one adapter are not equally fast, or where the base model is not surely faster.
    """
    noisy = {(r.engine, r.concurrency) for r in results if r.arm == CONTROL and r.verdict != "equivalent"}
    measured = [r.interval for r in results if r.arm == BASE and r.measure == "time per output token"]
    if not measured or noisy or any(high >= 1 for _, high in measured):
        return ""
    low, high = (f"{1 / end:.1f}" for end in (max(high for _, high in measured), min(low for low, _ in measured)))
    return f"Any adapter costs {low if low == high else f'{low} to {high}'} x the base model here (95 % interval)."
