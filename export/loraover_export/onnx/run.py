"""One ONNX export from command line to verdict: read, export, check, publish, show."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from loraover.common.atomic_output import check_free, publish_directory
from loraover.common.command_line import quiet_libraries
from loraover.common.errors import OutputError
from loraover.models.licence import known_licence
from loraover.reporting.model_card import model_card
from loraover_export.fold.certificate import EXIT_CODES
from loraover_export.numerics.matrix_certificate import matrix_facts
from loraover_export.onnx.export import Export
from loraover_export.onnx.report import REPORT_FILE, OnnxReport
from loraover_export.onnx.request import Inputs, OnnxRequest, read_inputs
from loraover_export.onnx.show import show_report


class _FailedError(Exception):
    """Leaves the block that would publish."""

    def __init__(self, report: OnnxReport) -> None:
        super().__init__()
        self.report = report


def run_onnx(request: OnnxRequest, as_json: bool) -> int:
    """Export, check and publish.

    Returns:
        The exit code: 0; 1 where a check failed and nothing was published; 3 where the export was published, and an
        adapter's effect on the outputs is too small for their check.

    Raises:
        LoraOverError: anything about the request, the files or the base model that makes the export impossible.
    """
    quiet_libraries()
    console = Console(stderr=as_json)
    _check_output(request)
    inputs = read_inputs(request, lambda line: console.print(escape(line), soft_wrap=True))
    try:
        with publish_directory(request.output, outside=request.sources[0], replace=request.force) as draft:
            report = Export(request, inputs, draft, console).run()
            if report.verdict == "failed":
                raise _FailedError(report)
            (draft / REPORT_FILE).write_text(report.model_dump_json(indent=1) + "\n")
            (draft / "README.md").write_text(_card(request, inputs, report), encoding="utf-8")
    except _FailedError as failed:
        report = failed.report
    show_report(report, request.output, console)
    if as_json:
        print(report.model_dump_json(indent=1))
    return EXIT_CODES[report.verdict]


def _check_output(request: OnnxRequest) -> None:
    target = request.output.absolute()
    for source in (*request.sources, *(() if request.graph is None else (request.graph,))):
        check_free(target, outside=source, replace=request.force)
    if target.exists() and any(target.iterdir()) and not (target / REPORT_FILE).is_file():
        raise OutputError(f"{target} holds no ONNX export, and --force replaces such only; choose another output.")


def _card(request: OnnxRequest, inputs: Inputs, report: OnnxReport) -> str:
    facts: dict[str, str] = {"mode": report.mode, "precision": report.precision, "verdict": report.verdict}
    facts |= {f"adapter {name}": source for name, source in report.adapters.items()}
    for check in report.checks:
        facts[f"max {check.quantity} error, {check.adapter or 'no adapter'}"] = (
            f"{check.error:.2e}, allowed {check.bound:.2e}"
        )
    facts |= matrix_facts(report.matrices) | inputs.base.facts()
    licence = known_licence(report.base_model, inputs.base.revision)
    kind = "ONNX graphs, with their LoRA adapters,"
    return model_card(
        "ONNX export", report.base_model, facts, request.command(), licence=licence, kind=kind, library="onnx"
    )
