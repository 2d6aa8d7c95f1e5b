"""The measurements of a parity run; those before a failure are kept."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from loraover.common.errors import EngineError, LoraOverError
from loraover.models.load import load_tokenizer
from loraover.models.memory import memory_explained
from loraover_serve.engines import engine_class
from loraover_serve.engines.answers import BASE
from loraover_serve.engines.base import BatchingEngine, Setting, Timed, TimedEngine
from loraover_serve.engines.sample import Sample, TokenRequest
from loraover_serve.engines.torch import memory_needs
from loraover_serve.engines.vllm import VllmEngine
from loraover_serve.parity.judge.outputs import Outputs, compare_outputs
from loraover_serve.parity.judge.several import Together, compare_together
from loraover_serve.parity.measure.arms import Arms, references
from loraover_serve.parity.measure.blocks import measure
from loraover_serve.parity.measure.cross_check import CrossCheck, cross_check
from loraover_serve.parity.measure.memory import PeakMemory, measure_memory
from loraover_serve.parity.measure.several import SeveralAdapters, adapter_of, answers_alone
from loraover_serve.parity.request import MIN_BLOCKS, ParityRequest
from loraover_serve.parity.samples import FOLDED, Measurement

COMPARED_PROMPTS = 8
MEMORY_WAVES = 4
Alone = dict[tuple[str, int], Sample]


@dataclass
class Measured:
    """The measurements so far, and why there are no more.

    Args:
        runs: Samples of every engine at every concurrency.
        memory: Peak memory of vLLM servers.
        cross_checks: Medians of `vllm bench serve` beside ours.
        outputs: Comparisons of answers with PyTorch's.
        together: Comparisons of several adapters' answers with those of each alone.
        alone: Answers of each of several adapters alone, by engine and concurrency.
        notes: Failures of measurements that the verdict does not depend on.
        versions: Versions that servers report.
        failure: Reason why the run ended early; None if it did not.
    """

    runs: list[Measurement] = field(default_factory=list)
    memory: list[PeakMemory] = field(default_factory=list)
    cross_checks: list[CrossCheck] = field(default_factory=list)
    outputs: list[Outputs] = field(default_factory=list)
    together: list[Together] = field(default_factory=list)
    alone: dict[tuple[str, int], Alone] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    failure: str | None = None

    @property
    def testable(self) -> list[Measurement]:
        """Runs with enough blocks for the statistical tests."""
        return [run for run in self.runs if run.blocks >= MIN_BLOCKS]

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Record a failure or Ctrl-C if something was measured before it; otherwise raise it."""
        try:
            yield
        except (LoraOverError, KeyboardInterrupt) as error:
            if not self.runs:
                raise
            self.failure = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)

    @contextmanager
    def optional(self, what: str) -> Iterator[None]:
        """Record a failure as a note, and continue: the verdict does not depend on this measurement."""
        try:
            yield
        except EngineError as error:
            self.notes.append(f"no {what}: {error}")


@dataclass(frozen=True)
class Collector:
    """Parity run.

    Args:
        request: The arguments of the run.
        arms: The adapters to compare.
        requests: The requests that every arm answers.
        setting: What engines are started with.
    """

    request: ParityRequest
    arms: Arms
    requests: Sequence[TokenRequest]
    setting: Setting

    def collect(self) -> Measured:
        """Measure every engine at every concurrency, then compare its answers with PyTorch's.

        Raises:
            LoraOverError: An engine that failed before one block was complete.
            KeyboardInterrupt: Ctrl-C before one block was complete.
        """
        measured = Measured()
        with measured.keep():
            for name in self.request.engines:
                self._measure(name, measured)
                if measured.failure is not None:
                    return measured
            needs = partial(memory_needs, self.setting)
            with memory_explained("the comparison with PyTorch", needs=needs, **self._compute):
                self._compare(measured)
        return measured

    @property
    def _compute(self) -> dict[str, str]:
        return {"device": self.setting.device, "compute_dtype": self.setting.compute_dtype}

    def _compare(self, measured: Measured) -> None:
        """Compare the answers of each run with those of PyTorch."""
        models, folded_name = references(self.arms, **self._compute)
        runs = measured.testable
        with self.request.report.task("comparing outputs with PyTorch, runs", len(runs)) as done:
            for count, run in enumerate(runs, 1):
                found = compare_outputs(run, self.requests, models, folded_name, COMPARED_PROMPTS)
                measured.outputs.append(found)
                if alone := measured.alone.get((run.engine, run.concurrency)):
                    mine = {name: models[name] for name in self._several}
                    answered_by = partial(adapter_of, self._several, run.concurrency)
                    measured.together += compare_together(run, self.requests, answered_by, alone, mine, found)
                done(count)

    def _measure(self, name: str, measured: Measured) -> None:
        kind = engine_class(name)
        assert issubclass(kind, TimedEngine)
        with kind.start_arms(self._logged(name)) as engines:
            for engine in engines:
                for concurrency in self.request.concurrencies(name):
                    run = self._run(self._shared(engine, concurrency), concurrency)
                    measured.runs.append(run)
                    measured.failure = run.failure
                    if run.failure is not None:
                        return
                    if self.arms.also:
                        measured.alone[run.engine, concurrency] = self._alone(engine, run)
                    if isinstance(engine, BatchingEngine):
                        self._ask_server(name, engine, run, measured)
        if issubclass(kind, BatchingEngine) and self.request.memory:
            with measured.optional("memory"):
                self._measure_memory(kind, self._logged(f"{name}-memory"), measured)

    def _logged(self, name: str) -> Setting:
        """Return the settings with which an engine is started, with a log of this name."""
        return replace(self.setting, log=self.setting.log.with_name(f"{name}.log"))

    @property
    def _several(self) -> tuple[str, ...]:
        """Names of the adapters that take turns."""
        return (FOLDED, *self.arms.also)

    def _shared(self, engine: TimedEngine, concurrency: int) -> Timed:
        """The engine with the arms of several adapters, if there are several."""
        if not self.arms.also:
            return engine
        together = engine.run_each if isinstance(engine, BatchingEngine) else None
        return SeveralAdapters(engine, self._several, concurrency, together)

    def _alone(self, engine: Timed, run: Measurement) -> Alone:
        """Answers of each adapter alone to the first waves in which every adapter has its turns."""
        self.request.report.line(
            f"{engine.name}, concurrency {run.concurrency}: {' and '.join(self._several)}, each alone"
        )
        size = self.request.waves * run.concurrency
        waves = size * math.ceil(COMPARED_PROMPTS / size)
        indices = sorted({sample.request for sample in run.samples})[:waves]
        return answers_alone(engine, self._several, self.requests, indices, run.concurrency)

    def _run(self, engine: Timed, concurrency: int) -> Measurement:
        blocks = self.request.blocks(concurrency)
        label = f"{engine.name}, concurrency {concurrency}, {len(engine.arms)} arms, blocks"
        with self.request.report.task(label, blocks) as done:
            count = itertools.count(1)
            return measure(
                engine,
                self.requests,
                concurrency=concurrency,
                blocks=blocks,
                seed=self.request.seed,
                waves=self.request.waves,
                on_block=lambda: done(next(count)),
            )

    def _ask_server(self, name: str, engine: BatchingEngine, run: Measurement, measured: Measured) -> None:
        """Ask the server for its version and, if requested, run vLLM's benchmark."""
        with measured.optional(f"version of {name}"):
            if (version := engine.version()) is not None:
                measured.versions[name] = version
        if self.request.cross_check and isinstance(engine, VllmEngine):
            self.request.report.line("vllm bench serve, on each arm")
            with measured.optional("cross-check"):
                self._cross_check(engine, run, measured)

    def _cross_check(self, engine: VllmEngine, run: Measurement, measured: Measured) -> None:
        tokenizer = load_tokenizer(self.arms.base)
        for arm in (arm for arm in engine.arms if arm not in self.arms.also):
            measured.cross_checks += cross_check(run, arm, engine, self.requests, tokenizer, self.setting)

    def _measure_memory(self, kind: type[BatchingEngine], setting: Setting, measured: Measured) -> None:
        """Start a server for each arm alone, and send it a few waves of requests."""
        servers = self.request.memory
        for arm in (BASE, *(arm for arm in self.arms.adapters if arm not in self.arms.also)):
            alone = {arm: self.arms.adapters[arm]} if arm != BASE else {}
            mine = replace(setting, adapters=alone)
            for concurrency in self.request.max_concurrency:
                self.request.report.line(
                    f"peak memory of {arm}, concurrency {concurrency}: starting {servers} server(s)"
                )
                few = self.requests[: MEMORY_WAVES * concurrency]
                found = measure_memory(kind, mine, arm, few, concurrency=concurrency, servers=servers)
                measured.memory.append(found)
