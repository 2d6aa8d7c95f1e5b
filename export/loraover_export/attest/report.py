"""The statement in the form of in-toto: which files, and which checks they passed; and its text for a terminal.

Sources, below https://github.com/in-toto/attestation/blob/main/spec: v1/statement.md, and the predicate for results of
tests, of which only version 0.1 exists, predicates/test-result.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel
from rich.console import Console

from loraover.common.strict_json import StrictModel
from loraover.reporting.palette import terminal_color
from loraover.reporting.reporter import print_line
from loraover_export.requests import AttestRequest


class Digest(BaseModel):
    """Digests of a file."""

    model_config = ConfigDict(frozen=True)

    sha256: str = Field(description="SHA-256, in hexadecimal digits", pattern="^[0-9a-f]{64}$")


class Resource(BaseModel):
    """A file."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="Path below the adapter's folder")
    digest: Digest = Field(description="Its digests")
    annotations: dict[str, Any] = Field(
        default={},
        description="Contents of a certificate without its lists, or digests of the reference; "
        "checked: false for a file that neither covers",
    )


class TestResult(BaseModel):
    """Results of the checks; a file names the fields as in-toto does."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, alias_generator=to_camel)
    __test__ = False  # for pytest

    result: Literal["PASSED", "WARNED", "FAILED"] = Field(description="The worst of the results")
    configuration: list[Resource] = Field(description="The certificates and the reference, with their SHA-256")
    passed_tests: list[str] = Field(description="Certificates whose verdict is passed")
    warned_tests: list[str] = Field(description="Certificates that could not decide")
    failed_tests: list[str] = Field(description="Certificates whose verdict is failed")


class Statement(BaseModel):
    """Contents of `attestation.json`."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, alias_generator=to_camel)

    type: Literal["https://in-toto.io/Statement/v1"] = Field(default="https://in-toto.io/Statement/v1", alias="_type")
    subject: list[Resource] = Field(description="The adapter's files", min_length=1)
    predicate_type: Literal["https://in-toto.io/attestation/test-result/v0.1"] = Field(
        default="https://in-toto.io/attestation/test-result/v0.1"
    )
    predicate: TestResult = Field(description="Results of the checks")


class AttestReport(StrictModel):
    """Attested files and verdicts, or the differences from them."""

    path: Path = Field(description="The statement")
    statement: Statement = Field(description="Its contents")
    is_checked: bool = Field(description="Whether the files were compared with it, and not written to it")
    is_signed: bool = Field(description="Whether the folder was signed, or its signature was verified")
    faults: list[str] = Field(description="Differences from the statement, in sentences")

    @property
    def passed(self) -> bool:
        """Whether everything agrees with the statement, and no certificate has failed."""
        return not self.faults and self.statement.predicate.result != "FAILED"

    @property
    def exit_code(self) -> int:
        """Exit code of the command."""
        return 0 if self.passed else 1


def show_report(report: AttestReport, request: AttestRequest, console: Console) -> None:
    """Print what was attested, or which files and checks differ from the statement."""
    found = report.statement.predicate
    kinds = {"passed": found.passed_tests, "undecided": found.warned_tests, "failed": found.failed_tests}
    tests = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)
    print_line(console, f"{len(report.statement.subject)} files; {tests}", terminal_color(found.result.lower()))
    if not report.is_checked:
        print_line(console, f"wrote {report.path}{', and signed the folder' if report.is_signed else ''}")
        return
    for fault in report.faults:
        print_line(console, fault, "red")
    if not report.faults:
        signed = "; the signature holds" if report.is_signed else "; no key was given to verify a signature"
        print_line(console, f"all files are as {report.path} has them{signed}", "green")
