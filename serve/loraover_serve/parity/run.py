"""Parity run, from its arguments to the report; what was measured before a failure is kept."""

from __future__ import annotations

import itertools
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from loraover.common.atomic_output import check_writable, publish_directory, publish_text
from loraover.common.errors import EngineError, LoraOverError, OutputError, UnwrittenReportError
from loraover.common.provenance import today
from loraover.common.reporter import Reporter
from loraover.models.device import choose_device
from loraover.models.load import load_tokenizer
from loraover.models.memory import memory_explained
from loraover.sources.verb import verb
from loraover_serve.engines import engine_class
from loraover_serve.engines.base import BatchingEngine, Sample, Setting, Timed, TimedEngine, TokenRequest
from loraover_serve.engines.installed import check_installed, machine, versions
from loraover_serve.engines.torch import memory_needs
from loraover_serve.engines.vllm import VllmEngine
from loraover_serve.judge.limits import BASE
from loraover_serve.parity.answers import Outputs, Together, compare_outputs, compare_together
from loraover_serve.parity.arms import Arms, prepare_arms, references
from loraover_serve.parity.blocks import SeveralAdapters, adapter_of, answers_alone, measure
from loraover_serve.parity.equivalence import ALPHA
from loraover_serve.parity.page import HTML_FILE, to_page
from loraover_serve.parity.report import REPORT_FILE, EngineVerdict, ParityReport
from loraover_serve.parity.request import MIN_BLOCKS, ParityRequest
from loraover_serve.parity.samples import CONTROL, FOLDED, VANILLA, Measurement, make_requests
from loraover_serve.parity.servers import CrossCheck, PeakMemory, cross_check, measure_memory
from loraover_serve.parity.statistics import Result, latencies, overall, results, throughputs

COMPARED_PROMPTS = 8
MEMORY_WAVES = 4
Alone = dict[tuple[str, int], Sample]


@verb(ParityRequest)
def measure_parity(request: ParityRequest) -> ParityReport:
    """Measure whether a folded adapter is as fast as a plain LoRA, and gives the answers it should.

    Every engine answers the same prompts with four arms: the base model, the baseline (a plain LoRA), a second copy of
    the baseline as control, and the folded adapter. An equivalence test compares the times of the folded adapter with
    the baseline's. The report's `verdict` is "equivalent", "different", "inconclusive", or "failed" if an engine failed
    after it had answered a part; the report then has that part.

    Raises:
        ConfigError: Arguments that cannot be used, an adapter that names no base model, or a task that is not a causal
            language model.
        CheckpointError: Files that cannot be read as an adapter, a checkpoint or an ONNX export, or an adapter that
            only fits a changed base model.
        DataError: A file of prompts that cannot be read.
        EngineError: An engine that failed before one block of requests was complete.
        ExportError: A model that cannot be written as an ONNX graph, or a `graph` that adapters cannot be run on.
        OutputError: An output that exists or cannot be written.
        ParityError: Adapters of different ranks or targets.
        UnwrittenReportError: An output that could not be written after the measurement; `error.report` has the report.
    """
    if request.output is not None:
        check_writable(request.output, outside=request.adapter)
    check_installed(request)
    kept = Path(tempfile.mkdtemp(prefix="loraover-parity-kept-"))
    try:
        report = _measured_report(request, kept)
        if request.output is not None:
            _write(report, request.output, request.adapter, kept)
    except BaseException as error:
        if place := _kept_in(kept, request.report):
            error.add_note(place)
        raise
    if request.output is None and (report.notes or report.verdict == "failed") and _kept_in(kept, request.report):
        return report.model_copy(update={"kept": kept})
    shutil.rmtree(kept, ignore_errors=True)  # `_kept_in` has removed it if it was empty
    return report


def _kept_in(folder: Path, reporter: Reporter) -> str:
    """Report which files are kept in a folder; where there are none, remove it and return an empty string."""
    names = sorted(file.name for file in folder.iterdir())
    if not names:
        folder.rmdir()
        return ""
    place = f"kept in {folder}: {', '.join(names)}"
    reporter.line(place)
    return place


def _measured_report(request: ParityRequest, logs: Path) -> ParityReport:
    with tempfile.TemporaryDirectory(prefix="loraover-parity-") as scratch:
        arms = prepare_arms(request, Path(scratch))
        requests = make_requests(
            request.workload,
            load_tokenizer(arms.base),
            request.num_prompts,
            prompt_tokens=request.prompt_tokens,
            new_tokens=request.new_tokens,
            seed=request.seed,
            file=request.prompts,
        )
        setting = Setting(
            request,
            arms.adapters,
            arms.base,
            Path(scratch),
            logs / "log",
            longest=max(len(one.prompt) + one.new_tokens for one in requests),
            device=str(choose_device(request.device)),
            compute_dtype=request.compute_dtype,
            checkpoint=arms.checkpoint,
            copies={CONTROL: VANILLA},
        )
        for name in request.engines:
            engine_class(name).check(setting)
        return _report(request, arms, Collector(request, arms, requests, setting).collect())


@dataclass
class Measured:
    """The measurements so far, and the failure that ended them, if one did.

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
    """The measurements of a run.

    Args:
        arms: The adapters to compare.
        requests: The requests that every arm answers.
        setting: Settings of the engines.
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
            self._compare(measured)
        return measured

    @property
    def _several(self) -> tuple[str, ...]:
        """Names of the adapters that take turns."""
        return (FOLDED, *self.arms.also)

    def _measure(self, name: str, measured: Measured) -> None:
        """Measure an engine at every concurrency, with the further figures of a server."""
        kind = engine_class(name)
        assert issubclass(kind, TimedEngine)
        with kind.start_arms(replace(self.setting, log=self.setting.log.with_name(f"{name}.log"))) as engines:
            for engine in engines:
                for concurrency in self.request.concurrencies(name):
                    shared: Timed = engine
                    if self.arms.also:
                        together = engine.run_each if isinstance(engine, BatchingEngine) else None
                        shared = SeveralAdapters(engine, self._several, concurrency, together)
                    run = self._run(shared, concurrency)
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
                self._measure_memory(kind, self.setting.log.with_name(f"{name}-memory.log"), measured)

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

    def _alone(self, engine: Timed, run: Measurement) -> Alone:
        """Answers of each adapter alone to the first waves in which every adapter has its turns."""
        names = " and ".join(self._several)
        self.request.report.line(f"{engine.name}, concurrency {run.concurrency}: {names}, each alone")
        size = self.request.waves * run.concurrency
        waves = size * math.ceil(COMPARED_PROMPTS / size)
        indices = sorted({sample.request for sample in run.samples})[:waves]
        return answers_alone(engine, self._several, self.requests, indices, run.concurrency)

    def _ask_server(self, name: str, engine: BatchingEngine, run: Measurement, measured: Measured) -> None:
        """Ask the server for its version and, if requested, run vLLM's benchmark."""
        with measured.optional(f"version of {name}"):
            if (version := engine.version()) is not None:
                measured.versions[name] = version
        if self.request.cross_check and isinstance(engine, VllmEngine):
            self.request.report.line("vllm bench serve, on each arm")
            with measured.optional("cross-check"):
                tokenizer = load_tokenizer(self.arms.base)
                for arm in (arm for arm in engine.arms if arm not in self.arms.also):
                    measured.cross_checks += cross_check(run, arm, engine, self.requests, tokenizer, self.setting)

    def _measure_memory(self, kind: type[BatchingEngine], log: Path, measured: Measured) -> None:
        """Start servers for each arm alone, and send each a few waves of requests."""
        servers = self.request.memory
        for arm in (BASE, *(arm for arm in self.arms.adapters if arm not in self.arms.also)):
            alone = {arm: self.arms.adapters[arm]} if arm != BASE else {}
            mine = replace(self.setting, log=log, adapters=alone)
            for concurrency in self.request.max_concurrency:
                place = f"{arm}, concurrency {concurrency}"
                self.request.report.line(f"peak memory of {place}: starting {servers} server(s)")
                few = self.requests[: MEMORY_WAVES * concurrency]
                found = measure_memory(kind, mine, arm, few, concurrency=concurrency, servers=servers)
                measured.memory.append(found)

    def _compare(self, measured: Measured) -> None:
        """Compare the answers of each run with those of PyTorch."""
        compute = {"device": self.setting.device, "compute_dtype": self.setting.compute_dtype}
        needs = partial(memory_needs, self.setting)
        with memory_explained("the comparison with PyTorch", needs=needs, **compute):
            models, folded_name = references(self.arms, **compute)
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


def _verdict(measured: Measured, found: list[Result]) -> tuple[EngineVerdict, str]:
    if measured.failure is not None:
        return "failed", measured.failure
    for o in measured.outputs:
        if o.unapplied:
            arms = ", ".join(o.unapplied)
            return "failed", f"{o.engine} does not apply {arms}: its answers are nearer to the base model's"
        if o.misapplied:
            return (
                "failed",
                f"{o.engine} applies adapters wrongly: the answers of the vanilla adapter are further from PyTorch's "
                "than the noise of the base model explains",
            )
    apart = [o.engine for o in measured.outputs if not o.agree]
    if apart:
        return (
            "different",
            f"the folded adapter's answers on {apart[0]} are further from PyTorch's than the vanilla adapter's are",
        )
    parted = [t for t in measured.together if not t.agree]
    if parted:
        worst = parted[0]
        return (
            "different",
            f"answers of {worst.adapter} in the arm {worst.arm} on {worst.engine}, along with other adapters, are "
            "further from PyTorch's than the vanilla adapter's are",
        )
    return overall(found)


def _report(request: ParityRequest, arms: Arms, measured: Measured) -> ParityReport:
    found = results(measured.testable, request.margin) if measured.testable else []
    verdict, reason = _verdict(measured, found)
    return ParityReport(
        verdict=verdict,
        reason=reason,
        margin=request.margin,
        alpha=ALPHA,
        results=found,
        latencies=latencies(measured.testable),
        throughputs=throughputs(measured.testable),
        memory=measured.memory,
        outputs=measured.outputs,
        together=measured.together,
        cross_checks=measured.cross_checks,
        notes=measured.notes,
        runs=measured.runs,
        base_model=arms.base.name,
        adapters={
            FOLDED: request.shown("adapter"),
            VANILLA: "random weights" if request.baseline is None else request.shown("baseline"),
            CONTROL: "a copy of the vanilla adapter",
            **{name: str(arms.adapters[name]) for name in arms.also},
        },
        workload={
            "kind": request.workload,
            "requests": request.num_prompts,
            "prompt_tokens": request.prompt_tokens,
            "new_tokens": request.new_tokens,
        },
        device=str(choose_device(request.device)),
        compute_dtype=request.compute_dtype,
        seed=request.seed,
        command=request.command(),
        versions=versions(request.engines) | measured.versions,
        hardware=machine(),
        date=today(),
    )


def _write(report: ParityReport, output: Path, adapter: Path, kept: Path) -> None:
    """Publish report, page and logs; if that fails, keep the report with the logs in `kept`."""
    text = report.model_dump_json() + "\n"
    try:
        with publish_directory(output, outside=adapter) as draft:
            (draft / REPORT_FILE).write_text(text, encoding="utf-8")
            to_page(report).write(draft / HTML_FILE)
            for log in kept.iterdir():
                shutil.copyfile(log, draft / log.name)
    except OutputError as error:
        place = None
        with suppress(OutputError):  # it may be impossible to write there as well
            publish_text(kept / REPORT_FILE, text)
            place = kept
        raise UnwrittenReportError(str(error), report.model_copy(update={"kept": place})) from error
