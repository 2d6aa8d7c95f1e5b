"""One parity run from command line to verdict."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from loraover.common.atomic_output import publish_directory, publish_text
from loraover.common.command_line import quiet_libraries
from loraover.models.load import load_tokenizer
from loraover_serve.engines.sample import Request
from loraover_serve.parity.collect import Collector, Measured
from loraover_serve.parity.judge.analysis import Result, latencies, overall, results, throughputs
from loraover_serve.parity.measure.arms import Arms, prepare_arms
from loraover_serve.parity.measure.start import LOG_FILE, Launch
from loraover_serve.parity.measure.workload import make_requests
from loraover_serve.parity.report.html import HTML_FILE, render
from loraover_serve.parity.report.machine import machine, versions
from loraover_serve.parity.report.parity_report import REPORT_FILE, EngineVerdict, ParityReport
from loraover_serve.parity.report.show import show_report
from loraover_serve.parity.request import ParityRequest
from loraover_serve.parity.samples import CONTROL, FOLDED, VANILLA

ALPHA = 0.05


def run_parity(request: ParityRequest, as_json: bool) -> int:
    """Measure, judge, show and write.

    Returns:
        0 equivalent, 1 different, 3 inconclusive, 2 where an engine failed in the middle and the report is partial.

    Raises:
        LoraOverError: anything that keeps the run from starting.
    """
    quiet_libraries()
    console = Console(stderr=as_json)
    request.check()
    kept, is_done_with = Path(tempfile.mkdtemp(prefix="loraover-parity-kept-")), False
    try:
        report = _measured_report(request, kept, console)
        show_report(report, console)
        if as_json:
            print(report.model_dump_json(exclude={"runs"}, indent=1))
        if request.out is not None:
            _write(report, request.out, request.folded, kept)
            console.print(f"wrote {escape(str(request.out))}", soft_wrap=True)
        is_done_with = request.out is not None or not (report.notes or report.verdict == "failed")
    finally:
        _end(kept, is_done_with)
    return report.exit_code


def _measured_report(request: ParityRequest, logs: Path, console: Console) -> ParityReport:
    def say(line: str) -> None:
        console.print(escape(line), soft_wrap=True)

    with tempfile.TemporaryDirectory(prefix="loraover-parity-") as scratch:
        arms = prepare_arms(
            request.folded,
            request.vanilla,
            request.checkpoint,
            Path(scratch),
            model=request.model,
            allow_unequal=request.allow_unequal,
            seed=request.seed,
            say=say,
        )
        collector = Collector(
            request,
            arms,
            _requests(request, arms),
            Path(scratch),
            Launch(request.vllm, logs / LOG_FILE, request.timeout_s, request.start_timeout_s, request.options),
            say,
        )
        return _report(request, arms, collector.collect())


def _write(report: ParityReport, out: Path, folded: Path, kept: Path) -> None:
    """Publish report, page and logs; `kept` has the samples already should that fail."""
    publish_text(kept / REPORT_FILE, report.model_dump_json() + "\n")
    with publish_directory(out, outside=folded) as draft:
        (draft / HTML_FILE).write_text(render(report), encoding="utf-8")
        for file in kept.iterdir():
            shutil.copyfile(file, draft / file.name)


def _end(kept: Path, is_done_with: bool) -> None:
    """Remove the servers' logs and the samples, or say where they are kept."""
    names = sorted(file.name for file in kept.iterdir())
    if is_done_with or not names:
        shutil.rmtree(kept)
    else:
        print(f"{', '.join(names)} kept in {kept}", file=sys.stderr)


def _requests(request: ParityRequest, arms: Arms) -> list[Request]:
    return make_requests(
        request.workload,
        load_tokenizer(arms.base),
        request.requests,
        prompt_tokens=request.prompt_tokens,
        new_tokens=request.new_tokens,
        seed=request.seed,
        file=request.prompts,
    )


def _verdict(measured: Measured, found: list[Result]) -> tuple[EngineVerdict, str]:
    if measured.failure is not None:
        return "failed", measured.failure
    for o in measured.outputs:
        if o.unapplied:
            return "failed", f"{o.engine} answers as the base model for {', '.join(o.unapplied)}"
    apart = [o.engine for o in measured.outputs if not o.agree]
    if apart:
        return "different", f"{apart[0]}'s answers are further from PyTorch than the vanilla adapter's are"
    return overall(found)


def _report(request: ParityRequest, arms: Arms, measured: Measured) -> ParityReport:
    found = results(measured.whole, request.margin, ALPHA) if measured.whole else []
    verdict, reason = _verdict(measured, found)
    return ParityReport(
        verdict=verdict,
        reason=reason,
        margin=request.margin,
        alpha=ALPHA,
        results=found,
        latencies=latencies(measured.whole),
        throughputs=throughputs(measured.whole),
        memory=measured.memory,
        outputs=measured.outputs,
        cross_checks=measured.cross_checks,
        notes=measured.notes,
        runs=measured.runs,
        base_model=arms.base.name,
        adapters={
            FOLDED: str(request.folded),
            VANILLA: "random weights" if request.vanilla is None else str(request.vanilla),
            CONTROL: "a copy of the vanilla adapter",
        },
        workload={
            "kind": request.workload,
            "requests": request.requests,
            "prompt_tokens": request.prompt_tokens,
            "new_tokens": request.new_tokens,
        },
        seed=request.seed,
        command=request.command(),
        versions=versions(request.engines) | measured.versions,
        hardware=machine(),
    )
