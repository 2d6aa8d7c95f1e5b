"""An attestation: the files are read, the statement is written and signed, or compared with the files."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from loraover.checkpoint.carried_reference import misfit, reference_digests
from loraover.checkpoint.files import REFERENCE_FILE
from loraover.checkpoint.tensor_file import sha256_of
from loraover.common.atomic_output import publish_file
from loraover.common.errors import CheckpointError, ExportError, OutputError
from loraover.common.strict_json import StrictModel, read_json
from loraover.common.verb import verb
from loraover_export.attest.request import AttestRequest
from loraover_export.attest.sign import SIGNATURE_FILE, read_signer, sign, signature_fault, visible_files
from loraover_export.attest.statement import Digest, Resource, Statement, TestResult
from loraover_export.fold.certificate import CERTIFICATE_FILE as FOLD
from loraover_export.logits.judge import ExportVerdict
from loraover_export.merge.request import CERTIFICATE_FILE as MERGE
from loraover_export.mlx.report import CERTIFICATE_FILE as MLX
from loraover_export.onnx.report import REPORT_FILE as ONNX
from loraover_export.uniform.certificate import CERTIFICATE_FILE as LORA
from loraover_export.uniform.certificate import CONVERSION_FILE as CONVERSION
from loraover_export.vllm.preflight import PREFLIGHT_FILE
from loraover_export.vllm.report import CERTIFICATE_FILE as VLLM

STATEMENT_FILE = "attestation.json"
CERTIFICATES = {
    FOLD: "fold",
    LORA: "conversion",
    CONVERSION: "conversion",
    MERGE: "merge",
    VLLM: "vllm",
    PREFLIGHT_FILE: "vllm pre-flight",
    MLX: "mlx",
    ONNX: "onnx",
}
"""Name of the test that each certificate is the result of, by the certificate's file."""
OTHERS = (STATEMENT_FILE, SIGNATURE_FILE, "README.md")
"""Files that are neither the adapter nor a result; a hub changes the last one."""


class Certificate(BaseModel):
    """What every certificate has."""

    model_config = ConfigDict(frozen=True, extra="allow")

    verdict: ExportVerdict


class AttestReport(StrictModel):
    """What was attested, or what is not as attested."""

    path: Path = Field(description="The statement")
    statement: Statement = Field(description="Its contents")
    is_checked: bool = Field(description="Whether the files were compared with it, and not written to it")
    is_signed: bool = Field(description="Whether the folder was signed, or its signature was verified")
    faults: list[str] = Field(description="What is not as attested, in sentences")

    @property
    def passed(self) -> bool:
        """Whether everything is as attested, and no certificate has failed."""
        return not self.faults and self.statement.predicate.result != "FAILED"

    @property
    def exit_code(self) -> int:
        """Exit code of the command."""
        return 0 if self.passed else 1


@verb(AttestRequest)
def attest_adapter(request: AttestRequest) -> AttestReport:
    """Write a statement of an adapter's files and of the checks that they passed, or compare the files with it.

    Raises:
        CheckpointError: No statement to compare with, or a certificate or a reference that cannot be trusted.
        ConfigError: Arguments that cannot be used, or a key that cannot.
        ExportError: A folder without any certificate or reference.
        ModuleNotFoundError: A key is given, and model-signing is not installed.
        OutputError: A statement that exists and may not be replaced, or that cannot be written.
    """
    path = request.adapter / STATEMENT_FILE
    if request.check:
        attested = read_json(path, Statement)
        faults = list(differences(attested, request.adapter))
        if request.public_key is not None:
            fault = signature_fault(request.adapter, request.public_key)
            faults += [] if fault is None else [fault]
        is_signed = request.public_key is not None
        return AttestReport(path=path, statement=attested, is_checked=True, is_signed=is_signed, faults=faults)
    _check_replaceable(request)
    signer, variable, signature = None, request.password_variable, None
    if request.private_key is not None:
        signer = read_signer(request.private_key, None if variable is None else os.environ[variable])
    made = make_statement(request.adapter)
    text = json.dumps(made.model_dump(by_alias=True), indent=1) + "\n"
    if signer is not None:
        signature = sign(request.adapter, signer, {STATEMENT_FILE: text})
    publish_file(path, lambda draft: draft.write_text(text, encoding="utf-8"), replace=request.force)
    if signature is None:
        (request.adapter / SIGNATURE_FILE).unlink(missing_ok=True)  # an earlier one does not hold any more
    else:
        signed = signature
        publish_file(request.adapter / SIGNATURE_FILE, lambda draft: draft.write_bytes(signed), replace=request.force)
    return AttestReport(path=path, statement=made, is_checked=False, is_signed=signer is not None, faults=[])


def _check_replaceable(request: AttestRequest) -> None:
    """Raise OutputError if there is an attestation, or a signature that a statement would end, without `force`."""
    statement, signature = request.adapter / STATEMENT_FILE, request.adapter / SIGNATURE_FILE
    if statement.exists() and not request.force:
        raise OutputError(
            f"{statement} exists; compare the files with it by {request.named('check')}, or replace it with "
            f"{request.named('force')}."
        )
    if signature.exists() and not request.force:
        raise OutputError(
            f"{signature} exists, and a new file in the folder would end its validity; attest a copy of the folder, or "
            f"replace the signature with {request.named('force')}."
        )


def make_statement(adapter: Path) -> Statement:
    """The statement of a folder's files.

    Args:
        adapter: The folder.

    Raises:
        CheckpointError: A file that cannot be read, a certificate that is none, or the reference of another adapter.
        ExportError: No certificate and no reference.
    """
    subjects, results = [], []
    tests: dict[str, list[str]] = {"passed": [], "failed": [], "inconclusive": []}
    for name, path in _files(adapter).items():
        if name in CERTIFICATES:
            found = read_json(path, Certificate)
            tests.get(found.verdict, tests["inconclusive"]).append(CERTIFICATES[name])
            results.append(_resource(path, name, _in_short(found.model_dump())))
        elif name.endswith(REFERENCE_FILE):
            results.append(_reference(path, name, tests))
        else:
            subjects.append(_resource(path, name))
    if not results:
        raise ExportError(
            f"{adapter}: holds no certificate and no reference, so there is nothing to attest; name the output of an "
            "export, or record a reference with `loraover serve record`."
        )
    result: Literal["PASSED", "WARNED", "FAILED"] = (
        "FAILED" if tests["failed"] else "WARNED" if tests["inconclusive"] else "PASSED"
    )
    return Statement(
        subject=subjects,
        predicate=TestResult(
            result=result,
            configuration=results,
            passed_tests=tests["passed"],
            warned_tests=tests["inconclusive"],
            failed_tests=tests["failed"],
        ),
    )


def differences(attested: Statement, adapter: Path) -> Iterator[str]:
    """Yield what differs between a statement and the files of a folder, in sentences.

    Args:
        attested: The statement.
        adapter: The folder.
    """
    named = {one.name: one.digest.sha256 for one in (*attested.subject, *attested.predicate.configuration)}
    found = _files(adapter)
    for name, digest in named.items():
        if name not in found:
            yield f"{name} is missing"
        elif sha256_of(found[name]) != digest:
            yield f"{name} has changed"
    yield from (f"{name} is not attested" for name in found if name not in named)


def _files(adapter: Path) -> dict[str, Path]:
    return {name: path for name, path in visible_files(adapter).items() if name not in OTHERS}


def _resource(path: Path, name: str, annotations: dict[str, Any] | None = None) -> Resource:
    try:
        return Resource(name=name, digest=Digest(sha256=sha256_of(path)), annotations=annotations or {})
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error


def _in_short(value: Any) -> Any:
    """A certificate without its lists, which have one entry for each matrix."""
    if isinstance(value, dict):
        return {key: _in_short(one) for key, one in value.items() if not isinstance(one, list)}
    return value


def _reference(path: Path, name: str, tests: dict[str, list[str]]) -> Resource:
    """The reference, whose test is whether it decides on a server in bfloat16."""
    reason = misfit(path)
    if reason is not None:
        raise CheckpointError(f"{reason}; record it again with `loraover serve record`, or remove it.")
    power = json.loads(gzip.decompress(path.read_bytes())).get("power")
    tests["passed" if isinstance(power, dict) and power.get("decides") is True else "inconclusive"].append("reference")
    return _resource(path, name, reference_digests(path))
