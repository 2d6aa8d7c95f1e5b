"""An engine on a made-up clock, and reports of its measurements."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from loraover.common.errors import EngineError
from loraover_serve.engines.base import Sample, Timed, TokenRequest
from loraover_serve.parity import equivalence
from loraover_serve.parity.answers import Answer, Distance, Outputs
from loraover_serve.parity.blocks import measure
from loraover_serve.parity.report import ParityReport
from loraover_serve.parity.samples import CONTROL, FOLDED, VANILLA
from loraover_serve.parity.servers import CrossCheck, PeakMemory, mean_interval
from loraover_serve.parity.statistics import PRIMARY, latencies, overall, results, throughputs

ARMS = ("base", VANILLA, CONTROL, FOLDED)


class Clockwork(Timed):
    """Engine that answers on a simulated clock that drifts; each arm is slower by a given share."""

    arms = ARMS

    def __init__(
        self,
        slower: dict[str, float],
        *,
        noise: float = 0.0,
        drift: float = 0.0,
        dies_at: int = -1,
        name: str = "clockwork",
    ) -> None:
        self.name = name
        self._slower, self._noise, self._drift, self._dies_at = slower, noise, drift, dies_at
        self._draw, self._calls = random.Random(0), 0

    def run(self, arm: str, block: int, first: int, requests: Sequence[TokenRequest]) -> list[Sample]:
        if block == self._dies_at:
            raise EngineError("the server answered 500")
        self._calls += 1
        samples = []
        for i, request in enumerate(requests):
            log = self._slower.get(arm, 0.0) + self._drift * self._calls + self._draw.gauss(0, self._noise)
            times = tuple(math.exp(log) * (k + 1) for k in range(request.new_tokens))
            samples.append(Sample(arm, block, first + i, 0.0, times, tuple(range(request.new_tokens))))
        return samples


def whole_report() -> ParityReport:
    """A report with something in every section: two engines, one of them at three concurrencies.

    Its bootstraps have a tenth of the usual resamples, which is enough for a report that is only shown.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equivalence, "RESAMPLES", 499)
        return _whole_report()


def _whole_report() -> ParityReport:
    slower = {"base": -0.2, FOLDED: 0.004}
    engines = [("vllm", 1), ("vllm", 2), ("vllm", 4), ("onnx merged", 1)]
    requests = [TokenRequest((1, 2, 3), 3)]
    runs = [
        measure(
            Clockwork(slower, noise=0.03, name=name),
            requests,
            concurrency=concurrency,
            blocks=20 // concurrency,
            seed=concurrency,
        )
        for name, concurrency in engines
    ]
    found = results(runs, margin=0.05)
    verdict, reason = overall(found)
    return ParityReport(
        verdict=verdict,
        reason=reason,
        margin=0.05,
        alpha=0.05,
        results=found,
        latencies=latencies(runs),
        throughputs=throughputs(runs),
        memory=[
            PeakMemory(concurrency=c, arm=arm, bytes=found, interval=mean_interval(found))
            for arm in ARMS
            for c, found in ((1, [2**31, 2_400_000_000, 2**31]), (4, [2**31]))
        ],
        outputs=_outputs(),
        cross_checks=[
            CrossCheck(concurrency=1, arm=arm, measure=measure, ours=0.0312, bench_serve=0.0309)
            for arm in ARMS
            for measure in ("time to first token", *PRIMARY)
        ],
        notes=["no cross-check: vllm bench serve ended with code 1"],
        runs=runs,
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        adapters={FOLDED: "folded", VANILLA: "random weights", CONTROL: "a copy of the vanilla adapter"},
        workload={"kind": "fixed", "requests": 40, "prompt_tokens": 32, "new_tokens": 3},
        seed=0,
        command="loraover serve parity --adapter " + "a-rather-long-folder-name/" * 9 + "folded --engine vllm",
        versions={"python": "3.12.3", "torch": "2.13.0", "vllm": "0.32.0"},
        hardware="a processor of some name with several cores",
        date="2026-11-25",
    )


def _outputs() -> list[Outputs]:
    """Answers of an engine that returns log-probabilities, and of one that returns none."""
    near = Distance(
        reference="the vanilla adapter",
        equal=1.0,
        largest_gap=0.0,
        logprob_rms=2e-3,
        logprob_error=1e-4,
        logprob_largest=9e-3,
        answers=[Answer(request=i, gap=None, logprob_rms=2e-3) for i in range(8)],
    )
    silent = near.model_copy(update={"logprob_rms": None, "logprob_error": None, "logprob_largest": None})
    folded = {"reference": "the unfolded checkpoint", "equal": 0.875, "largest_gap": 3e-3}
    return [
        Outputs(
            engine=engine,
            concurrency=1,
            prompts=8,
            controls_equal=1.0,
            repeats_equal=1.0,
            vanilla_equal=0.25,
            noise_rms=floor.logprob_rms,
            unapplied=[],
            folded=floor.model_copy(update=folded),
            vanilla=floor,
            agree=True,
        )
        for engine, floor in (("vllm", near), ("onnx merged", silent))
    ]
