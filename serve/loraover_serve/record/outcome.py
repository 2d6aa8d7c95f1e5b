"""The result of a check by references, in the forms in which verify reports: the same report, page and files."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from loraover.common.atomic_output import publish_directory, publish_file
from loraover.common.errors import EngineError, OutputError, UnwrittenReportError
from loraover.common.provenance import environment, processor, today
from loraover_serve.judge.limits import EXIT_CODES
from loraover_serve.verify.html import HTML_FILE, to_page
from loraover_serve.verify.report import REPORT_FILE, EngineResult, VerifyReport
from loraover_serve.verify.request import VerifyRequest


def to_report(
    request: VerifyRequest, known: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]
) -> VerifyReport:
    """The report of a check.

    Args:
        request: What the user asked for.
        known: Facts of the references.
        found: Result of each adapter.

    Raises:
        EngineError: The server failed for every adapter.
    """
    if all(result["verdict"] == "failed" for result in found):
        raise EngineError(str(found[0]["reason"]))
    engines = [EngineResult.model_validate(dict(result)) for result in found]
    of_all = {
        "adapter": ", ".join(dict.fromkeys(one["adapter"] for one in known)),
        "sensitivity": max(one["sensitivity"] for one in known),
    }
    return VerifyReport(
        **{**known[0], **of_all},
        verdict=next(verdict for verdict in EXIT_CODES if verdict in {result.verdict for result in engines}),
        engines=engines,
        reference="the reference",
        served_format=request.declared_format,
        prompt_source="those of the reference",
        command=request.command(),
        versions=environment(),
        hardware=f"{processor()}, {platform.platform()}",
        date=today(),
    )


def publish(request: VerifyRequest, report: VerifyReport) -> VerifyReport:
    """Write the report, its page and the file for JUnit where they are asked for, and return the report.

    Args:
        request: What the user asked for.
        report: The report.

    Raises:
        UnwrittenReportError: A file that cannot be written; `error.report` has the report.
    """
    try:
        if request.output is not None:
            with publish_directory(request.output) as draft:
                (draft / REPORT_FILE).write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
                to_page(report).write(draft / HTML_FILE)
        if request.junit is not None:
            content = to_junit(report)
            publish_file(request.junit, lambda draft: draft.write_bytes(content))
    except OutputError as error:
        raise UnwrittenReportError(str(error), report) from error
    return report


def to_junit(report: VerifyReport) -> bytes:
    """The verdicts as JUnit's test cases: *differs* is a failure, *failed* an error, *inconclusive* skipped.

    Args:
        report: The report.
    """
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
