"""An attestation: a signed statement, in the form of in-toto, of an adapter's files and of the checks that they passed.

The files are read, and the statement is written and signed, or compared with the files.

Sources, below https://github.com/in-toto/attestation/blob/main/spec: v1/statement.md, and the predicate for results of
tests, of which only version 0.1 exists, predicates/test-result.md.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel
from rich.console import Console

from loraover.adapters.uniform.certificate import CERTIFICATE_FILE as LORA
from loraover.adapters.uniform.certificate import CONVERSION_FILE as CONVERSION
from loraover.adapters.verdict import ExportVerdict
from loraover.checkpoint.carried_files import covered_files, misfit, reference_digests
from loraover.checkpoint.files import REFERENCE_FILE
from loraover.checkpoint.tensor_file import sha256_of
from loraover.common.atomic_output import publish_file
from loraover.common.errors import CheckpointError, ConfigError, ExportError, OutputError
from loraover.common.paths import Listing, list_folder
from loraover.common.strict_json import StrictModel, read_json
from loraover.reporting.palette import terminal_color
from loraover.reporting.reporter import print_line
from loraover.sources.verb import verb
from loraover_export.formats.vllm.rules import PREFLIGHT_FILE
from loraover_export.publishing import PRODUCTS
from loraover_export.requests import AttestRequest

STATEMENT_FILE = "attestation.json"

SIGNATURE_FILE = "model.sig"
"""Name of the signature that the package model-signing gives it."""

CERTIFICATES = {
    **{product.certificate: verb for verb, product in PRODUCTS.items()},
    LORA: "conversion",
    CONVERSION: "conversion",
    PREFLIGHT_FILE: "vllm pre-flight",
}
"""Test whose result a certificate is, by the name of the certificate's file."""

OTHERS = (STATEMENT_FILE, SIGNATURE_FILE, "README.md")
"""Files that are neither the adapter nor a result; a hub changes the last one."""

UNCHECKED = "other files"
"""Name of the test that warns of files which no certificate and no reference covers."""

NOT_A_FILE = "not a regular file, but a link to a folder, a broken link, a pipe or a device"

KEYS = "expected an elliptic-curve key (P-256, P-384 or P-521)"


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
        print_line(console, f"all files match {report.path}{signed}", "green")


class AnyCertificate(BaseModel):
    """Fields that every certificate has."""

    model_config = ConfigDict(frozen=True, extra="allow")

    verdict: ExportVerdict
    output: dict[str, str] = {}


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
    path, signed = request.adapter / STATEMENT_FILE, request.adapter / SIGNATURE_FILE
    if request.check:
        attested = read_json(path, Statement)
        faults = list(differences(attested, request.adapter))
        is_signed = request.public_key is not None
        if request.public_key is not None:
            fault = signature_fault(request.adapter, request.public_key)
            faults += [] if fault is None else [fault]
        return AttestReport(path=path, statement=attested, is_checked=True, is_signed=is_signed, faults=faults)
    if path.exists() and not request.force:
        raise OutputError(
            f"{path} exists; compare the files with it by {request.named('check')}, or replace it with "
            f"{request.named('force')}."
        )
    if signed.exists() and not request.force:
        raise OutputError(
            f"{signed} exists, and a new file in the folder would make this signature invalid; attest a copy of the "
            "folder, or "
            f"replace the signature with {request.named('force')}."
        )
    signer, variable = None, request.password_variable
    if request.private_key is not None:
        signer = read_signer(request.private_key, None if variable is None else os.environ[variable])
    made = make_statement(request.adapter)
    text = json.dumps(made.model_dump(by_alias=True), indent=1) + "\n"
    signature = None if signer is None else sign(request.adapter, signer, {STATEMENT_FILE: text})
    publish_file(path, lambda draft: draft.write_text(text, encoding="utf-8"), replace=request.force)
    if signature is None:
        signed.unlink(missing_ok=True)  # an earlier one does not hold any more
    else:
        content = signature
        publish_file(signed, lambda draft: draft.write_bytes(content), replace=request.force)
    return AttestReport(path=path, statement=made, is_checked=False, is_signed=signer is not None, faults=[])


def make_statement(adapter: Path) -> Statement:
    """Return the statement of a folder's files, or raise an error for a file or a certificate that is not trusted."""
    files, others = _listed(adapter)
    if others:
        raise CheckpointError(f"{adapter / others[0]}: {NOT_A_FILE}; remove it.")
    subjects, results = [], []
    tests: dict[str, list[str]] = {"passed": [], "failed": [], "inconclusive": []}
    resources: dict[str, Resource] = {}
    for name, path in files.items():
        try:
            resources[name] = Resource(name=name, digest=Digest(sha256=sha256_of(path)))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}.") from error
    covered: set[str] = set()
    for name, path in files.items():
        if name in CERTIFICATES:
            found = read_json(path, AnyCertificate)
            _check_output(path, found, resources)
            covered |= found.output.keys()
            tests.get(found.verdict, tests["inconclusive"]).append(CERTIFICATES[name])
            results.append(resources[name].model_copy(update={"annotations": _in_short(found.model_dump())}))
        elif name.endswith(REFERENCE_FILE):
            reason = misfit(path)
            if reason is not None:
                raise CheckpointError(f"{reason}; record it again with `loraover record`, or remove it.")
            power = json.loads(gzip.decompress(path.read_bytes())).get("power")
            decides = isinstance(power, dict) and power.get("decides") is True  # on a server in bfloat16
            tests["passed" if decides else "inconclusive"].append("reference")
            results.append(resources[name].model_copy(update={"annotations": reference_digests(path)}))
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
    """Raise CheckpointError unless a certificate belongs to the files beside it."""
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
    """Yield what differs between a statement and the files of a folder, in sentences."""
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
            f"{STATEMENT_FILE} says {attested.predicate.result}, but the certificates beside it say "
            f"{made.predicate.result}"
        )


def _listed(adapter: Path) -> Listing:
    """Return the contents of a folder, without files that are neither the adapter nor a result."""
    try:
        files, others = list_folder(adapter)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename}: not a folder that can be read; name the folder of an adapter."
        ) from error
    return Listing({name: path for name, path in files.items() if name not in OTHERS}, others)


def _in_short(value: Any) -> Any:
    """A certificate without its lists, which have one entry for each matrix."""
    if isinstance(value, dict):
        return {key: _in_short(one) for key, one in value.items() if not isinstance(one, list)}
    return value


def read_signer(private_key: Path, password: str | None) -> Any:
    """Return model-signing's configuration that signs with the elliptic-curve key in a PEM file."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from model_signing import signing

    raw: Any = None if password is None else password.encode()  # 1.1.1 gives it to a function that takes bytes
    try:
        return signing.Config().use_elliptic_key_signer(private_key=private_key, password=raw)
    except (AttributeError, OSError, TypeError, UnsupportedAlgorithm, ValueError) as error:  # 1.1.1 asks RSA for curves
        raise ConfigError(f"{private_key}: not a private key that can sign, {KEYS}: {error}.") from error


def sign(adapter: Path, signer: Any, new: Mapping[str, str]) -> bytes:
    """Return the signature of a folder's files, to which those of `new` will be added, by their names and contents."""
    signer.set_hashing_config(_hashing())
    try:
        with _signed_files(adapter, new) as folder:
            signature = folder.parent / SIGNATURE_FILE
            signer.sign(folder, signature)
            return signature.read_bytes()
    except (OSError, ValueError) as error:
        raise ExportError(f"{adapter}: cannot be signed: {error}. Nothing was changed there.") from error


def signature_fault(adapter: Path, public_key: Path) -> str | None:
    """Say why the signature of a folder does not hold for the key in a PEM file; None if it does."""
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from model_signing import verifying

    signature = adapter / SIGNATURE_FILE
    if not signature.is_file():
        return f"{SIGNATURE_FILE} is missing"
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except (AttributeError, OSError, TypeError, UnsupportedAlgorithm, ValueError) as error:  # as in `read_signer`
        raise ConfigError(f"{public_key}: not a public key that can verify, {KEYS}: {error}.") from error
    config.set_hashing_config(_hashing())
    try:
        with _signed_files(adapter) as folder:
            config.verify(folder, signature)
    except (AttributeError, InvalidSignature, LookupError, TypeError, ValueError) as error:  # of any JSON in the file
        return f"{SIGNATURE_FILE}: {error or 'made with another key, or changed'}"
    return None


@contextmanager
def _signed_files(adapter: Path, new: Mapping[str, str] = {}) -> Iterator[Path]:
    """A folder with the adapter's name and links to the files that a signature covers."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / adapter.resolve().name
        for name, path in list_folder(adapter).files.items():
            if name not in (SIGNATURE_FILE, *new):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).symlink_to(path.resolve())
        for name, text in new.items():
            (folder / name).write_text(text, encoding="utf-8")
        yield folder


def _hashing() -> Any:
    from model_signing import hashing

    ignored = [SIGNATURE_FILE, ".cache"]  # the signature has their names, by which the package's own command knows them
    return hashing.Config().set_ignored_paths(paths=ignored).set_allow_symlinks(True)
