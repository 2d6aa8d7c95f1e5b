"""The report of a verification, and its files: verify.json, the page, engines' logs, and verdicts for JUnit."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from loraover.common.atomic_output import publish_directory, publish_file, publish_text
from loraover.common.errors import OutputError, UnwrittenReportError
from loraover.common.provenance import today
from loraover_serve.judge.limits import EXIT_CODES
from loraover_serve.verify.found import KEPT_PREFIX, Found, copy_logs
from loraover_serve.verify.html import HTML_FILE, to_page
from loraover_serve.verify.report import REPORT_FILE, EngineResult, VerifyReport
from loraover_serve.verify.request import VerifyRequest


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
        kept = _kept(text, found.logs)
        message = str(error) if kept is None else f"{error} The report is kept in {kept}."
        raise UnwrittenReportError(message, report.model_copy(update={"kept": kept})) from error
    return report


def _kept(text: str, logs: Sequence[Path]) -> Path | None:
    """A new temporary folder with the report and the logs; None if they cannot be written there either."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=KEPT_PREFIX))
        publish_text(folder / REPORT_FILE, text)
        copy_logs(logs, folder)
    except OSError:
        return None
    return folder


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
