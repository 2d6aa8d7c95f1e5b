"""Statistics of samples: ratios of times with verdicts, and quantiles and throughput without."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Literal

from pydantic import Field

from loraover.common.strict_json import StrictModel
from loraover_serve.engines.base import Sample
from loraover_serve.parity.equivalence import Comparison, compare, decide, quantile_intervals, quantile_of
from loraover_serve.parity.samples import CONTROL, FOLDED, VANILLA, Measurement

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
QUANTILE_NAMES = tuple(f"p{100 * q:g}" for q in QUANTILES)


class Result(StrictModel):
    """Measure of an arm, compared with the vanilla adapter (the baseline)."""

    engine: str
    concurrency: int
    arm: str
    measure: str
    ratio: float = Field(description="Ratio of geometric means, arm to vanilla")
    interval: tuple[float, float] = Field(
        description="95 % interval of the ratio, by a studentised bootstrap over blocks"
    )
    adjusted_interval: tuple[float, float] = Field(
        description="Interval of the ratio at the Holm-adjusted confidence; the verdict is different if it lies beyond "
        "the margin"
    )
    blocks: int = Field(description="Number of blocks")
    waves: int = Field(default=1, description="Number of waves of requests that an arm answers in a row")
    equivalence_p: float = Field(description="P-value of the hypothesis that the times differ by more than the margin")
    difference_p: float = Field(
        description="P-value of the hypothesis that the times differ by less than the margin, Holm-adjusted over every "
        "comparison of folded with vanilla"
    )
    needed_blocks: int | None = Field(
        description="Number of blocks that would show equivalence of equal arms with a probability of 90 %; None if no "
        "number would"
    )
    verdict: Literal["equivalent", "different", "inconclusive"]


class Latency(StrictModel):
    """Quantiles of one measure of one arm, in seconds; the verdict does not depend on them."""

    engine: str
    concurrency: int
    arm: str
    measure: str
    quantiles: dict[str, float] = Field(description="Quantiles p50, p90 and p99, in seconds")
    intervals: dict[str, tuple[float, float]] = Field(
        description="95 % interval of each quantile, by a bootstrap over blocks, in seconds"
    )


class Throughput(StrictModel):
    """Generated tokens per second of one arm.

    A wave is a group of simultaneous requests; its time runs from the first request sent to the last token.
    """

    engine: str
    concurrency: int
    arm: str
    tokens_per_second: float = Field(description="Median over waves of tokens per second")
    interval: tuple[float, float] = Field(description="95 % interval of the median, by a bootstrap over blocks")


def log_ratios(run: Measurement, arm: str, measure: Measure) -> list[float]:
    """Mean log time of an arm minus that of the vanilla adapter, one number for each block."""
    logs: dict[tuple[int, str], list[float]] = {}
    for sample in run.samples:
        logs.setdefault((sample.block, sample.arm), []).append(math.log(measure(sample)))
    blocks = sorted({block for block, _ in logs})
    return [fmean(logs[block, arm]) - fmean(logs[block, VANILLA]) for block in blocks]


def results(runs: Sequence[Measurement], margin: float) -> list[Result]:
    """Compare every arm with the vanilla adapter.

    Comparisons of the folded arm, which the verdict depends on, are corrected for their number (Holm).

    Args:
        runs: Samples of every engine at every concurrency.
        margin: Largest difference of times that still counts as equal (0.05 is 5 %).
    """
    found: dict[tuple[str, int, str, str], Comparison] = {}
    for run in runs:
        for arm in sorted({sample.arm for sample in run.samples}):
            if arm != VANILLA:
                for name, measure in PRIMARY.items():
                    differences = log_ratios(run, arm, measure)
                    found[run.engine, run.concurrency, arm, name] = compare(differences, margin=margin)
    found |= decide({key: comparison for key, comparison in found.items() if key[2] == FOLDED})
    for key, comparison in found.items():
        if key[2] != FOLDED:
            found |= decide({key: comparison})
    waves = {(run.engine, run.concurrency): run.waves for run in runs}
    return [
        Result(
            engine=engine,
            concurrency=concurrency,
            arm=arm,
            measure=name,
            ratio=comparison.ratio,
            interval=comparison.interval(0.95),
            adjusted_interval=comparison.interval(comparison.confidence),
            blocks=comparison.blocks,
            waves=waves[engine, concurrency],
            equivalence_p=comparison.equivalence_p,
            difference_p=comparison.difference_p,
            needed_blocks=comparison.needed_blocks,
            verdict=comparison.verdict,
        )
        for (engine, concurrency, arm, name), comparison in found.items()
    ]


def overall(found: Sequence[Result]) -> tuple[Literal["equivalent", "different", "inconclusive"], str]:
    """The verdict on the folded adapter against the vanilla one, and its reason in words."""
    folded = [result for result in found if result.arm == FOLDED]
    noisy = [result for result in found if result.arm == CONTROL and result.verdict != "equivalent"]
    different = [result for result in (noisy or folded) if result.verdict == "different"]
    open_ = [result for result in folded if result.verdict == "inconclusive"]
    if different:
        worst = max(different, key=lambda result: abs(math.log(result.ratio)))
        if noisy:
            return (
                "inconclusive",
                f"two copies of one adapter differ {_by(worst)}, so this machine is too noisy to compare",
            )
        return "different", _by(worst)
    if noisy or open_:
        cause = "this machine is too noisy" if noisy else "an interval reaches beyond the margin"
        return "inconclusive", f"{cause} at {_requests(found)} requests; {requests_needed(found)}"
    return "equivalent", "in every primary measure, and so are two copies of one adapter"


def _by(result: Result) -> str:
    low, high = result.interval
    return (
        f"by {result.ratio - 1:+.1%} [{low - 1:+.1%}, {high - 1:+.1%}] in {result.measure} "
        f"({result.engine}, concurrency {result.concurrency})"
    )


def _requests(found: Sequence[Result]) -> int:
    return max(2 * r.blocks * r.waves * r.concurrency for r in found)


def requests_needed(found: Sequence[Result]) -> str:
    """Number of requests that would decide each inconclusive comparison of equally fast arms, in words.

    The probability of 90 % is that of one comparison: with several, more requests are needed to decide all at once.

    Args:
        found: The comparisons that `results` returns.
    """
    undecided = [
        r
        for r in found
        if (r.arm == CONTROL and r.verdict != "equivalent") or (r.arm == FOLDED and r.verdict == "inconclusive")
    ]
    needed = [r.needed_blocks and 2 * r.needed_blocks * r.waves * r.concurrency for r in undecided]
    if None in needed:
        return "no number of requests would be enough"
    most = max(filter(None, needed))
    if most <= _requests(found):
        return "a ratio lies too near the margin to decide"
    return f"about {most} requests would be enough if the two are equally fast"


def latencies(runs: Sequence[Measurement]) -> list[Latency]:
    """Quantiles of every measure of every arm."""
    described = []
    for run in runs:
        for arm, samples in _by_arm(run).items():
            for name, values in DESCRIBED.items():
                blocks = _by_block((sample.block, values(sample)) for sample in samples)
                if not any(blocks):
                    continue
                described.append(
                    Latency(
                        engine=run.engine,
                        concurrency=run.concurrency,
                        arm=arm,
                        measure=name,
                        quantiles=dict(zip(QUANTILE_NAMES, quantile_of(blocks, QUANTILES), strict=True)),
                        intervals=dict(zip(QUANTILE_NAMES, quantile_intervals(blocks, QUANTILES), strict=True)),
                    )
                )
    return described


def throughputs(runs: Sequence[Measurement]) -> list[Throughput]:
    """Tokens per second of every arm."""
    found = []
    for run in runs:
        for arm, samples in _by_arm(run).items():
            waves = [samples[i : i + run.concurrency] for i in range(0, len(samples), run.concurrency)]
            tokens = [sum(len(sample.token_ids) for sample in wave) for wave in waves]
            seconds = [max(s.token_s[-1] for s in wave) - min(s.start_s for s in wave) for wave in waves]
            blocks = _by_block((w[0].block, [n / time]) for w, n, time in zip(waves, tokens, seconds, strict=True))
            found.append(
                Throughput(
                    engine=run.engine,
                    concurrency=run.concurrency,
                    arm=arm,
                    tokens_per_second=quantile_of(blocks, [0.5])[0],
                    interval=quantile_intervals(blocks, [0.5])[0],
                )
            )
    return found


def _by_block(values: Iterable[tuple[int, Sequence[float]]]) -> list[list[float]]:
    blocks: dict[int, list[float]] = {}
    for block, found in values:
        blocks.setdefault(block, []).extend(found)
    return list(blocks.values())


def _by_arm(run: Measurement) -> Mapping[str, list[Sample]]:
    arms: dict[str, list[Sample]] = {arm: [] for arm in sorted({sample.arm for sample in run.samples})}
    for sample in run.samples:
        arms[sample.arm].append(sample)
    return arms
