"""Parity run, from its arguments to the report."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from loraover.common.atomic_output import check_writable, publish_directory, publish_text
from loraover.common.errors import OutputError, UnwrittenReportError
from loraover.common.provenance import today
from loraover.common.reporter import Reporter
from loraover.models.device import choose_device
from loraover.models.load import load_tokenizer
from loraover.sources.verb import verb
from loraover_serve.engines import engine_class
from loraover_serve.engines.base import Setting
from loraover_serve.engines.installed import check_installed, machine, versions
from loraover_serve.parity.collect import Collector, Measured
from loraover_serve.parity.judge.analysis import Result, latencies, overall, results, throughputs
from loraover_serve.parity.judge.equivalence import ALPHA
from loraover_serve.parity.measure.arms import Arms, prepare_arms
from loraover_serve.parity.measure.workload import make_requests
from loraover_serve.parity.report.page import HTML_FILE, to_page
from loraover_serve.parity.report.parity_report import REPORT_FILE, EngineVerdict, ParityReport
from loraover_serve.parity.request import ParityRequest
from loraover_serve.parity.samples import CONTROL, FOLDED, VANILLA


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
