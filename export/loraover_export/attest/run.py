"""An attestation: the files are read, the statement is written and signed, or compared with the files."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from loraover.adapters.logits.judge import ExportVerdict
from loraover.adapters.uniform.certificate import CERTIFICATE_FILE as LORA
from loraover.adapters.uniform.certificate import CONVERSION_FILE as CONVERSION
from loraover.checkpoint.carried_reference import covered_files, misfit, reference_digests
from loraover.checkpoint.files import REFERENCE_FILE
from loraover.checkpoint.tensor_file import sha256_of
from loraover.common.atomic_output import publish_file
from loraover.common.errors import CheckpointError, ExportError, OutputError
from loraover.common.paths import Listing, list_folder
from loraover.common.strict_json import StrictModel, read_json
from loraover.sources.verb import verb
from loraover_export.attest.request import AttestRequest
from loraover_export.attest.sign import SIGNATURE_FILE, read_signer, sign, signature_fault
from loraover_export.attest.statement import Digest, Resource, Statement, TestResult
from loraover_export.formats.vllm.preflight import PREFLIGHT_FILE
from loraover_export.publishing import PRODUCTS

STATEMENT_FILE = "attestation.json"
CERTIFICATES = {
    **{product.certificate: verb for verb, product in PRODUCTS.items()},
    LORA: "conversion",
    CONVERSION: "conversion",
    PREFLIGHT_FILE: "vllm pre-flight",
}
"""Name of the test that each certificate is the result of, by the certificate's file."""
OTHERS = (STATEMENT_FILE, SIGNATURE_FILE, "README.md")
"""Files that are neither the adapter nor a result; a hub changes the last one."""
UNCHECKED = "other files"
"""Name of the test that warns of files that no certificate and no reference is of."""
NOT_A_FILE = "neither a file nor a folder, but a link to a folder or to nothing, a pipe or a device"


class AnyCertificate(BaseModel):
    """Fields that every certificate has."""

    model_config = ConfigDict(frozen=True, extra="allow")

    verdict: ExportVerdict
    output: dict[str, str] = {}


class AttestReport(StrictModel):
    """Attested files and verdicts, or the differences from them."""

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
        CheckpointError: A file that cannot be read, anything but files and folders, a certificate that is none or is of
            other files, or the reference of another adapter.
        ExportError: No certificate and no reference.
    """
    files, others = _listed(adapter)
    if others:
        raise CheckpointError(f"{adapter / others[0]}: {NOT_A_FILE}; remove it.")
    subjects, results = [], []
    tests: dict[str, list[str]] = {"passed": [], "failed": [], "inconclusive": []}
    resources = {name: _resource(path, name) for name, path in files.items()}
    covered: set[str] = set()
    for name, path in files.items():
        if name in CERTIFICATES:
            found = read_json(path, AnyCertificate)
            _check_output(path, found, resources)
            covered |= found.output.keys()
            tests.get(found.verdict, tests["inconclusive"]).append(CERTIFICATES[name])
            results.append(resources[name].model_copy(update={"annotations": _in_short(found.model_dump())}))
        elif name.endswith(REFERENCE_FILE):
            results.append(_reference(path, resources[name], tests))
            covered.update(covered_files(path))
        else:
            subjects.append(resources[name])
    if not results:
        raise ExportError(
            f"{adapter}: holds no certificate and no reference, so there is nothing to attest; name the output of an "
            "export, or record a reference with `loraover record`."
        )
    if any(subject.name not in covered for subject in subjects):
        tests["inconclusive"].append(UNCHECKED)
    result: Literal["PASSED", "WARNED", "FAILED"] = (
        "FAILED" if tests["failed"] else "WARNED" if tests["inconclusive"] else "PASSED"
    )
    return Statement(
        subject=[
            subject if subject.name in covered else subject.model_copy(update={"annotations": {"checked": False}})
            for subject in subjects
        ],
        predicate=TestResult(
            result=result,
            configuration=results,
            passed_tests=tests["passed"],
            warned_tests=tests["inconclusive"],
            failed_tests=tests["failed"],
        ),
    )


def _check_output(path: Path, certificate: AnyCertificate, resources: Mapping[str, Resource]) -> None:
    """Raise CheckpointError unless a certificate is that of the files beside it."""
    if not certificate.output:
        raise CheckpointError(f"{path}: names no digests of the output's files; export the adapter again.")
    for name, digest in certificate.output.items():
        if name not in resources or resources[name].digest.sha256 != digest:
            found = resources[name].digest.sha256 if name in resources else "no such file"
            raise CheckpointError(
                f"{path}: is the certificate of another {name}: expected SHA-256 {digest:.12}, found {found:.12}; "
                "export the adapter again."
            )


def differences(attested: Statement, adapter: Path) -> Iterator[str]:
    """Yield what differs between a statement and the files of a folder, in sentences.

    Args:
        attested: The statement.
        adapter: The folder.
    """
    named = {one.name: one.digest.sha256 for one in (*attested.subject, *attested.predicate.configuration)}
    files, others = _listed(adapter)
    faults = [f"{name}: {NOT_A_FILE}" for name in others]
    for name, digest in named.items():
        if name not in files:
            faults.append(f"{name} is missing")
        elif sha256_of(files[name]) != digest:
            faults.append(f"{name} has changed")
    faults += [f"{name} is not attested" for name in files if name not in named]
    yield from faults
    if faults:
        return
    try:
        made = make_statement(adapter)
    except (CheckpointError, ExportError) as error:
        yield str(error)
        return
    if made != attested:
        yield (
            f"{STATEMENT_FILE} says {attested.predicate.result}, and differs from what the certificates beside it say, "
            f"which is {made.predicate.result}"
        )


def _listed(adapter: Path) -> Listing:
    """Return what is in a folder, but for files that are neither the adapter nor a result.

    Raises:
        CheckpointError: No such folder, or one that cannot be read.
    """
    try:
        files, others = list_folder(adapter)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: not a folder that can be read; name that of an adapter.") from error
    return Listing({name: path for name, path in files.items() if name not in OTHERS}, others)


def _resource(path: Path, name: str) -> Resource:
    try:
        return Resource(name=name, digest=Digest(sha256=sha256_of(path)))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error


def _in_short(value: Any) -> Any:
    """A certificate without its lists, which have one entry for each matrix."""
    if isinstance(value, dict):
        return {key: _in_short(one) for key, one in value.items() if not isinstance(one, list)}
    return value


def _reference(path: Path, resource: Resource, tests: dict[str, list[str]]) -> Resource:
    """The reference, whose test is whether it decides on a server in bfloat16."""
    reason = misfit(path)
    if reason is not None:
        raise CheckpointError(f"{reason}; record it again with `loraover record`, or remove it.")
    power = json.loads(gzip.decompress(path.read_bytes())).get("power")
    tests["passed" if isinstance(power, dict) and power.get("decides") is True else "inconclusive"].append("reference")
    return resource.model_copy(update={"annotations": reference_digests(path)})
