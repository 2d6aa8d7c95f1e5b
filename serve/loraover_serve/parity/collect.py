"""Everything that a parity run measures, kept as far as it came."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loraover.common.errors import EngineError, LoraOverError
from loraover.models.load import load_tokenizer
from loraover_serve.engines.base import Engine
from loraover_serve.engines.sample import Request
from loraover_serve.parity.judge.equivalence import MIN_BLOCKS
from loraover_serve.parity.judge.outputs import Outputs, compare_outputs
from loraover_serve.parity.measure.arms import Arms
from loraover_serve.parity.measure.blocks import measure
from loraover_serve.parity.measure.cross_check import CrossCheck, cross_check
from loraover_serve.parity.measure.memory import PeakMemory, measure_memory
from loraover_serve.parity.measure.start import MEMORY_LOG_FILE, Launch, references, started, started_vllm
from loraover_serve.parity.request import ParityRequest
from loraover_serve.parity.samples import BASE, Measurement

if TYPE_CHECKING:
    from loraover_serve.engines.vllm import VllmEngine

COMPARED_PROMPTS = 8
MEMORY_WAVES = 4


@dataclass
class Measured:
    """What there is so far, and why there is no more.

    Args:
        notes: what went wrong with measurements that decide nothing.
        versions: that servers tell.
    """

    runs: list[Measurement] = field(default_factory=list)
    memory: list[PeakMemory] = field(default_factory=list)
    cross_checks: list[CrossCheck] = field(default_factory=list)
    outputs: list[Outputs] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    failure: str | None = None

    @property
    def whole(self) -> list[Measurement]:
        """Runs with enough blocks for the tests."""
        return [run for run in self.runs if run.blocks >= MIN_BLOCKS]

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Keep what was measured before a failure or Ctrl-C; the first failure of a run with nothing yet is raised."""
        try:
            yield
        except (LoraOverError, KeyboardInterrupt) as error:
            if not self.runs:
                raise
            self.failure = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)

    @contextmanager
    def note(self, what: str) -> Iterator[None]:
        """Go on without a measurement that decides nothing."""
        try:
            yield
        except EngineError as error:
            self.notes.append(f"no {what}: {error}")


@dataclass(frozen=True)
class Collector:
    """One parity run.

    Args:
        folder: for exports and copies of adapters.
        say: shows a line.
    """

    request: ParityRequest
    arms: Arms
    requests: Sequence[Request]
    folder: Path
    launch: Launch
    say: Callable[[str], None]

    def collect(self) -> Measured:
        """Every engine at every concurrency, then its answers against PyTorch's.

        Raises:
            LoraOverError: an engine failed before one block was whole; KeyboardInterrupt likewise.
        """
        measured = Measured()
        with measured.keep():
            for name in self.request.engines:
                self._measure(name, measured)
                if measured.failure is not None:
                    return measured
            self.say("comparing outputs with PyTorch")
            folded, folded_name, vanilla = references(self.arms)
            for run in measured.whole:
                found = compare_outputs(run, self.requests, folded, folded_name, vanilla, COMPARED_PROMPTS)
                measured.outputs.append(found)
        return measured

    def _measure(self, name: str, measured: Measured) -> None:
        with started(name, self.arms, self.requests, self.folder, self.launch, self.say) as engines:
            for engine in engines:
                for concurrency in self.request.concurrencies(name):
                    run = self._run(engine, concurrency)
                    measured.runs.append(run)
                    measured.failure = run.failure
                    if run.failure is not None:
                        return
                    if name == "vllm":
                        self._ask_server(engine, run, measured)
        if name == "vllm" and self.request.memory:
            with measured.note("memory"):
                self._measure_memory(measured)

    def _run(self, engine: Engine, concurrency: int) -> Measurement:
        blocks = self.request.blocks(concurrency)
        self.say(f"{engine.name}, concurrency {concurrency}: {blocks} blocks of {len(engine.arms)} arms")
        return measure(engine, self.requests, concurrency=concurrency, blocks=blocks, seed=self.request.seed)

    def _ask_server(self, engine: Engine, run: Measurement, measured: Measured) -> None:
        """Its version and, where it is asked for, vLLM's own benchmark."""
        from loraover_serve.engines.vllm import VllmEngine

        assert isinstance(engine, VllmEngine)
        with measured.note("version of vLLM"):
            measured.versions["vllm"] = engine.server.version()
        if self.request.cross_check:
            self.say("vllm bench serve, on each arm")
            with measured.note("cross-check"):
                self._cross_check(engine, run, measured)

    def _cross_check(self, engine: VllmEngine, run: Measurement, measured: Measured) -> None:
        tokenizer = load_tokenizer(self.arms.base)
        for arm, model in engine.models.items():
            measured.cross_checks += cross_check(
                run,
                arm,
                model,
                self.requests,
                tokenizer,
                vllm=self.launch.vllm,
                url=engine.server.url,
                folder=self.folder,
            )

    def _measure_memory(self, measured: Measured) -> None:
        """A few waves of requests for each arm in a server of its own."""
        launch = replace(self.launch, log=self.launch.log.with_name(MEMORY_LOG_FILE))
        servers = self.request.memory
        for arm in (BASE, *self.arms.adapters):
            alone = {arm: self.arms.adapters[arm]} if arm != BASE else {}
            start = partial(started_vllm, alone, self.arms, self.requests, self.folder, launch)
            for concurrency in self.request.concurrency:
                self.say(f"peak memory of {arm}, concurrency {concurrency}: {servers} server(s) of its own")
                few = self.requests[: MEMORY_WAVES * concurrency]
                measured.memory.append(measure_memory(start, arm, few, concurrency=concurrency, servers=servers))
