"""From samples to verdicts and descriptions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from loraover_serve.parity.equivalence import Comparison, compare, decide, median_interval
from loraover_serve.parity.measure import Run
from loraover_serve.parity.sample import Sample

VANILLA, CONTROL, FOLDED = "vanilla", "control", "folded"
Measure = Callable[[Sample], float]
PRIMARY: dict[str, Measure] = {
    "time per output token": lambda sample: sample.per_token_s,
    "end-to-end latency": lambda sample: sample.end_to_end_s,
}
DESCRIBED: dict[str, Callable[[Sample], Sequence[float]]] = {
    "time to first token": lambda sample: [sample.first_token_s],
    "time per output token": lambda sample: [sample.per_token_s],
    "inter-token latency": lambda sample: sample.between_tokens_s,
    "end-to-end latency": lambda sample: [sample.end_to_end_s],
}
QUANTILES = (0.5, 0.9, 0.99)


class Result(BaseModel):
    """One measure of one arm against the vanilla adapter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str
    concurrency: int
    arm: str
    measure: str
    ratio: float = Field(description="of geometric means, arm to vanilla")
    interval: tuple[float, float] = Field(description="95 %, studentised")
    blocks: int
    equivalence_p: float
    difference_p: float = Field(description="Holm-adjusted over every comparison of folded with vanilla")
    needed_blocks: int | None
    verdict: Literal["equivalent", "different", "inconclusive"]


class Latency(BaseModel):
    """Quantiles of one measure of one arm, in seconds, with 95 % bootstrap intervals; they decide nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str
    concurrency: int
    arm: str
    measure: str
    quantiles: dict[str, float]
    intervals: dict[str, tuple[float, float]]


class Throughput(BaseModel):
    """Generated tokens per second of one arm: of each wave of concurrent requests, first sent to last token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    engine: str
    concurrency: int
    arm: str
    tokens_per_second: float = Field(description="median over waves")
    interval: tuple[float, float]


def log_ratios(run: Run, arm: str, measure: Measure) -> list[float]:
    """For each block, mean log of the arm's samples minus that of the vanilla adapter's."""
    logs: dict[tuple[int, str], list[float]] = {}
    for sample in run.samples:
        logs.setdefault((sample.block, sample.arm), []).append(math.log(measure(sample)))
    blocks = sorted({block for block, _ in logs})
    return [fmean(logs[block, arm]) - fmean(logs[block, VANILLA]) for block in blocks]


def results(runs: Sequence[Run], margin: float, alpha: float = 0.05) -> list[Result]:
    """Every arm against the vanilla adapter; what counts, folded against vanilla, is corrected for its number."""
    found: dict[tuple[str, int, str, str], Comparison] = {}
    for run in runs:
        for arm in sorted({sample.arm for sample in run.samples}):
            if arm != VANILLA:
                for name, measure in PRIMARY.items():
                    differences = log_ratios(run, arm, measure)
                    found[run.engine, run.concurrency, arm, name] = compare(differences, margin=margin, alpha=alpha)
    counted = {" ".join(map(str, key)): key for key in found if key[2] == FOLDED}
    decided = decide({name: found[key] for name, key in counted.items()}, alpha=alpha)
    for name, key in counted.items():
        found[key] = decided[name]
    for key, comparison in found.items():
        if key[2] != FOLDED:
            found[key] = decide({"": comparison}, alpha=alpha)[""]
    return [_result(key, comparison) for key, comparison in found.items()]


def _result(key: tuple[str, int, str, str], comparison: Comparison) -> Result:
    engine, concurrency, arm, measure = key
    return Result(
        engine=engine,
        concurrency=concurrency,
        arm=arm,
        measure=measure,
        ratio=comparison.ratio,
        interval=comparison.interval,
        blocks=comparison.blocks,
        equivalence_p=comparison.equivalence_p,
        difference_p=comparison.difference_p,
        needed_blocks=comparison.needed_blocks,
        verdict=comparison.verdict,
    )


def overall(found: Sequence[Result]) -> tuple[Literal["equivalent", "different", "inconclusive"], str]:
    """The verdict on folded against vanilla, and its reason in words.

    Where identical adapters (the control) do not pass as equivalent, the machine is too noisy for any verdict but a
    difference.
    """
    folded = [result for result in found if result.arm == FOLDED]
    different = [result for result in folded if result.verdict == "different"]
    noisy = [result for result in found if result.arm == CONTROL and result.verdict != "equivalent"]
    open_ = [result for result in folded if result.verdict == "inconclusive"]
    if different:
        worst = max(different, key=lambda result: abs(math.log(result.ratio)))
        low, high = worst.interval
        return "different", (
            f"by {worst.ratio - 1:+.1%} [{low - 1:+.1%}, {high - 1:+.1%}] in {worst.measure} "
            f"({worst.engine}, concurrency {worst.concurrency})"
        )
    if noisy or open_:
        requests = max(2 * result.blocks * result.concurrency for result in found)
        needed = max(
            math.inf if result.needed_blocks is None else 2 * result.needed_blocks * result.concurrency
            for result in (*noisy, *open_)
        )
        if needed == math.inf:
            enough = "no number would do"
        else:
            enough = f"{needed} would do" if needed > requests else "a ratio lies too near the margin to tell"
        cause = "this machine is too noisy" if noisy else "an interval does not lie within the margin"
        return "inconclusive", f"{cause} at {requests} requests; {enough}"
    return "equivalent", "in every primary measure, and so are two copies of one adapter"


def latencies(runs: Sequence[Run]) -> list[Latency]:
    """Quantiles of every measure of every arm."""
    described = []
    for run in runs:
        for arm, samples in _by_arm(run).items():
            for name, values in DESCRIBED.items():
                data = [value for sample in samples for value in values(sample)]
                if data:
                    described.append(_latency(run, arm, name, data))
    return described


def _latency(run: Run, arm: str, measure: str, data: Sequence[float]) -> Latency:
    return Latency(
        engine=run.engine,
        concurrency=run.concurrency,
        arm=arm,
        measure=measure,
        quantiles={f"p{100 * q:g}": float(np.quantile(data, q)) for q in QUANTILES},
        intervals={f"p{100 * q:g}": median_interval(data, quantile=q) for q in QUANTILES},
    )


def throughputs(runs: Sequence[Run]) -> list[Throughput]:
    """Tokens per second of every arm."""
    found = []
    for run in runs:
        for arm, samples in _by_arm(run).items():
            waves = [samples[i : i + run.concurrency] for i in range(0, len(samples), run.concurrency)]
            rates = [
                sum(len(sample.token_ids) for sample in wave)
                / (max(sample.token_s[-1] for sample in wave) - min(sample.start_s for sample in wave))
                for wave in waves
            ]
            found.append(
                Throughput(
                    engine=run.engine,
                    concurrency=run.concurrency,
                    arm=arm,
                    tokens_per_second=float(np.median(rates)),
                    interval=median_interval(rates),
                )
            )
    return found


def _by_arm(run: Run) -> Mapping[str, list[Sample]]:
    arms: dict[str, list[Sample]] = {arm: [] for arm in sorted({sample.arm for sample in run.samples})}
    for sample in run.samples:
        arms[sample.arm].append(sample)
    return arms
