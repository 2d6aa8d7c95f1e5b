"""Verification, from its arguments to the report and its files: by PyTorch or by references, and published alike."""

from __future__ import annotations

import platform
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

from loraover.common.atomic_output import (
    check_file_writable,
    check_writable,
    publish_directory,
    publish_file,
    publish_text,
)
from loraover.common.errors import EngineError, OutputError, UnwrittenReportError
from loraover.common.provenance import environment, processor, today
from loraover.sources.verb import verb
from loraover_serve.judge.limits import EXIT_CODES
from loraover_serve.verify.by_reference import ask_server, endpoint_of, neighbours
from loraover_serve.verify.report import (
    KEPT_PREFIX,
    REPORT_FILE,
    EngineResult,
    Found,
    VerifyReport,
    copy_logs,
    faults_known_of,
)
from loraover_serve.verify.request import VerifyRequest
from loraover_serve.verify.show import HTML_FILE, to_page


@verb(VerifyRequest)
def verify_adapter(request: VerifyRequest) -> VerifyReport:
    """Verify that engines answer as an adapter was trained, and name the likely fault of one that does not.

    Each engine gets the adapter in the form that it needs, and answers the same prompts with the base model and with
    the adapter. Its answers are compared with those of PyTorch in float32: of the unfolded model for a LoRA-Over
    checkpoint, of PEFT for any other adapter of a causal language model, which is converted for the engines if it is no
    plain LoRA. The engine's distance on the base model is its noise. A server is asked for each of the two models again
    while it answers for the other one. The report's `verdict` is "as trained", "differs", "inconclusive" if the adapter
    moves the answers less than the noise, or "failed" if an engine failed after another had answered.

    With references, a running server is compared with PyTorch's answers that they hold, and PyTorch is not imported.

    Raises:
        ConfigError: Arguments that cannot be used, a task that is not a causal language model, or a base model that
            cannot be loaded.
        CheckpointError: Files that cannot be read as an adapter, a checkpoint, a reference or an ONNX export.
        DataError: A file of prompts that cannot be read.
        EngineError: An engine that is not installed, or every engine failed; the message names the logs that are kept.
        ExportError: An adapter that cannot be exported for the only engine, or a `graph` that it cannot be run on.
        OutputError: An output that exists or cannot be written.
        UnwrittenReportError: An output that could not be written after the verification; `error.report` has the report.
    """
    if request.output is not None:
        check_writable(request.output, outside=request.adapter)
    if request.junit is not None:
        check_file_writable(request.junit)
    if request.references:
        return publish(request, by_references(request))
    from loraover_serve.verify.by_pytorch import by_pytorch  # with PyTorch

    with by_pytorch(request) as found:
        return publish(request, found)


def by_references(request: VerifyRequest) -> Found:
    """Verify a running server by references."""
    known, found = ask_server(request, neighbours(request.references))
    server = faults_known_of(endpoint_of(request).engine())
    found = [result if result["verdict"] == "failed" else result | server for result in found]
    facts = known[0] | {
        "adapter": ", ".join(dict.fromkeys(one["adapter"] for one in known)),
        "sensitivity": max(one["sensitivity"] for one in known),
        "reference": "the reference",
        "prompt_source": "those of the reference",
        "versions": environment(),
        "hardware": f"{processor()}, {platform.platform()}",
    }
    failures = [EngineError(str(result["reason"])) for result in found if result["verdict"] == "failed"]
    return Found(facts, found, failures)


def publish(request: VerifyRequest, found: Found) -> VerifyReport:
    """Write the report and its files where they are asked for, and return the report.

    Args:
        request: What the user asked for.
        found: Findings of the verification.

    Raises:
        LoraOverError: The first one, if every engine failed.
        UnwrittenReportError: A file that cannot be written; `error.report` has the report, and a temporary folder has
            report and logs.
    """
    results = [EngineResult.model_validate(result) for result in found.results]
    report = VerifyReport(
        verdict=next(verdict for verdict in EXIT_CODES if verdict in {result.verdict for result in results}),
        engines=results,
        served_format=request.declared_format,
        command=request.command(),
        date=today(),
        **found.facts,
    )
    text, has_failed = report.model_dump_json(indent=1) + "\n", len(found.failures) == len(results)
    try:
        if request.output is not None and (found.logs or not has_failed):
            with publish_directory(request.output, outside=request.adapter) as draft:
                (draft / REPORT_FILE).write_text(text, encoding="utf-8")
                to_page(report).write(draft / HTML_FILE)
                for log in found.logs:
                    shutil.copyfile(log, draft / log.name)
        if has_failed:
            raise found.failures[0]
        if request.junit is not None:
            content = to_junit(report)
            publish_file(request.junit, lambda draft: draft.write_bytes(content))
    except OutputError as error:
        kept: Path | None = None
        with suppress(OSError):  # the disk of temporary folders may be full as well
            folder = Path(tempfile.mkdtemp(prefix=KEPT_PREFIX))
            publish_text(folder / REPORT_FILE, text)
            copy_logs(found.logs, folder)
            kept = folder
        message = str(error) if kept is None else f"{error} The report is kept in {kept}."
        raise UnwrittenReportError(message, report.model_copy(update={"kept": kept})) from error
    return report


def to_junit(report: VerifyReport) -> bytes:
    """The verdicts as JUnit's test cases: *differs* is a failure, *failed* an error, *inconclusive* skipped."""
    kinds: dict[str, str] = {"differs": "failure", "failed": "error", "inconclusive": "skipped"}
    names = {"differs": "failures", "failed": "errors", "inconclusive": "skipped"}
    counts = {name: str(sum(result.verdict == one for result in report.engines)) for one, name in names.items()}
    facts = {"name": VerifyRequest.verb, "tests": str(len(report.engines)), **counts}
    suite = ElementTree.Element("testsuite", facts)
    for result in report.engines:
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": "verify", "name": result.engine, "time": f"{result.seconds:.3f}"}
        )
        if result.verdict in kinds:
            ElementTree.SubElement(case, kinds[result.verdict], {"message": result.reason, "type": result.fault or ""})
    found: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return found
