"""`loraover export attest`: the statement, its comparison with the files, and signatures by model-signing."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraover.checkpoint.files import REFERENCE_FILE
from loraover.common.command_line import run
from loraover_export.attest.run import STATEMENT_FILE
from loraover_export.attest.sign import SIGNATURE_FILE
from loraover_export.cli import cli

from support.make_checkpoint import edit_json, make_checkpoint
from support.recorded import write_reference


@pytest.fixture(scope="module")
def attested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folded adapter with a reference and its attestation."""
    folder = tmp_path_factory.mktemp("attested")
    made = make_checkpoint(folder)
    assert run(cli, ["fold", str(made.path), "-o", str(folder / "folded")]) == 0
    write_reference(folder / "folded")
    assert run(cli, ["attest", str(folder / "folded")]) == 0
    return folder / "folded"


@pytest.fixture
def adapter(attested: Path, tmp_path: Path) -> Path:
    return shutil.copytree(attested, tmp_path / "adapter")


def test_the_statement_has_the_form_of_in_toto(attested: Path) -> None:
    found: dict[str, Any] = json.loads((attested / STATEMENT_FILE).read_text())
    assert found["_type"] == "https://in-toto.io/Statement/v1"
    assert found["predicateType"] == "https://in-toto.io/attestation/test-result/v0.1"
    result = found["predicate"]
    assert (result["result"], result["passedTests"], result["warnedTests"]) == ("WARNED", ["fold"], ["reference"])
    resources = {one["name"]: one["digest"]["sha256"] for one in (*found["subject"], *result["configuration"])}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {one["name"] for one in found["subject"]}
    assert {"fold_certificate.json", REFERENCE_FILE} == {one["name"] for one in result["configuration"]}
    for name, digest in resources.items():
        assert hashlib.sha256((attested / name).read_bytes()).hexdigest() == digest


def test_in_totos_own_package_reads_it(attested: Path) -> None:
    statement = pytest.importorskip("in_toto_attestation.v1.statement_pb2", reason="in-toto-attestation is missing")
    formats = pytest.importorskip("google.protobuf.json_format")
    found = formats.Parse((attested / STATEMENT_FILE).read_text(), statement.Statement())
    assert len(found.subject) >= 2
    result = pytest.importorskip("in_toto_attestation.predicates.test_result.v0.test_result_pb2")
    predicate = json.loads((attested / STATEMENT_FILE).read_text())["predicate"]
    assert formats.ParseDict(predicate, result.TestResult()).result == "WARNED"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensors": (lambda folder: cut(folder / "adapter_model.safetensors"), "adapter_model.safetensors has changed"),
    "certificate": (lambda folder: cut(folder / "fold_certificate.json"), "fold_certificate.json has changed"),
    "missing": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "further": (lambda folder: (folder / "more.bin").write_bytes(b"1"), "more.bin is not attested"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named(name: str, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["attest", str(adapter), "--check"]) == 0
    (adapter / "README.md").write_text("a hub writes this")
    assert run(cli, ["attest", str(adapter), "--check"]) == 0
    change, words = CHANGES[name]
    change(adapter)
    assert run(cli, ["attest", str(adapter), "--check"]) == 1
    assert words in capsys.readouterr().out


def test_what_cannot_be_attested_is_refused(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["attest", str(adapter)]) == 2
    assert "exists; compare the files with it by --check" in capsys.readouterr().err
    write_reference(adapter, "0" * 64)
    assert run(cli, ["attest", str(adapter), "--force"]) == 2
    assert "was recorded of an adapter with the digest" in capsys.readouterr().err
    (adapter / REFERENCE_FILE).unlink()
    edit_json(adapter / "fold_certificate.json", lambda content: content.update(verdict="failed"))
    assert run(cli, ["attest", str(adapter), "--force"]) == 1
    (adapter / "fold_certificate.json").unlink()
    assert run(cli, ["attest", str(adapter), "--force"]) == 2
    assert "nothing to attest" in capsys.readouterr().err


def test_every_certificate_beside_an_adapter_counts(adapter: Path) -> None:
    """That of a conversion before an export for vLLM, and that of a merge, have the names of their own files."""
    certificate = (adapter / "fold_certificate.json").read_text()
    for name in ("conversion.json", "merge_certificate.json"):
        (adapter / name).write_text(certificate)
    assert run(cli, ["attest", str(adapter), "--force"]) == 0
    predicate = json.loads((adapter / STATEMENT_FILE).read_text())["predicate"]
    assert predicate["passedTests"] == ["conversion", "fold", "merge"]
    edit_json(adapter / "conversion.json", lambda content: content.update(verdict="failed"))
    assert run(cli, ["attest", str(adapter), "--force"]) == 1


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A private key, its public key, and another public key."""
    pytest.importorskip("model_signing", reason="model-signing is missing: pip install 'loraover[sign]'")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    mine, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    paths = tmp_path / "signing.pem", tmp_path / "signing.pub", tmp_path / "other.pub"
    secret = serialization.BestAvailableEncryption(b"a password")
    form = serialization.PrivateFormat.PKCS8
    paths[0].write_bytes(mine.private_bytes(serialization.Encoding.PEM, form, secret))
    for key, path in ((mine, paths[1]), (other, paths[2])):
        public = key.public_key()
        kind = serialization.PublicFormat.SubjectPublicKeyInfo
        path.write_bytes(public.public_bytes(serialization.Encoding.PEM, kind))
    return paths


def test_a_signature_holds_until_a_file_or_the_statement_changes(
    adapter: Path,
    keys: tuple[Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    private, public, other = map(str, keys)
    monkeypatch.chdir(adapter.parent)
    check = ["attest", adapter.name, "--check", "--public-key"]
    assert run(cli, [*check, public]) == 1
    assert "model.sig is missing" in capsys.readouterr().out
    sign = ["attest", str(adapter), "--force", "--private-key", private]
    assert run(cli, sign) == 2
    assert "not a private key that can sign" in capsys.readouterr().err
    monkeypatch.setenv("SIGNING_PASSWORD", "a password")
    assert run(cli, [*sign, "--password-variable", "SIGNING_PASSWORD"]) == 0
    assert run(cli, [*check, public]) == 0
    assert run(cli, [*check, other]) == 1
    assert f"{SIGNATURE_FILE}: " in capsys.readouterr().out
    edit_json(adapter / STATEMENT_FILE, lambda content: content["predicate"].update(result="PASSED"))
    assert run(cli, [*check, public]) == 1
    # The library writes a list of texts as Python does, whose quotes depend on the bytes of the digests in it.
    assert re.search(r"Hash mismatch for \\*'attestation\.json", capsys.readouterr().out.replace("\n", " "))
    assert run(cli, ["attest", str(adapter), "--force"]) == 0
    assert run(cli, [*check, public]) == 1
    assert "model.sig is missing" in capsys.readouterr().out
