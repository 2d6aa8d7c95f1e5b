"""`loraover export attest`: the statement, its comparison with the files, and signatures by model-signing."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from loraover.checkpoint.files import REFERENCE_FILE
from loraover.common.command_line import run
from loraover_export.attest import SIGNATURE_FILE, STATEMENT_FILE
from loraover_export.cli import cli
from loraover_export.publishing import PRODUCTS

from support.adapters_on_disk import save_base, save_lora
from support.conversions import SOURCES, make_base, make_source
from support.make_checkpoint import edit_json, edit_tensors, make_checkpoint, tree
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


IRREGULAR = "not a regular file"
CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensors": (lambda folder: cut(folder / "adapter_model.safetensors"), "adapter_model.safetensors has changed"),
    "certificate": (lambda folder: cut(folder / "fold_certificate.json"), "fold_certificate.json has changed"),
    "missing": (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "further": (lambda folder: (folder / "more.bin").write_bytes(b"1"), "more.bin is not attested"),
    "linked folder": (lambda folder: (folder / "more").symlink_to(folder.parent), f"more: {IRREGULAR}"),
    "broken link": (
        lambda folder: (folder / "more.bin").symlink_to("nowhere"),
        f"more.bin: {IRREGULAR}",
    ),
    "pipe": (lambda folder: os.mkfifo(folder / "more.bin"), f"more.bin: {IRREGULAR}"),
    "pipe below": (lambda folder: mkfifo(folder / "in" / "more.bin"), f"in/more.bin: {IRREGULAR}"),
    "statement": (
        lambda folder: edit_json(folder / STATEMENT_FILE, passed),
        "says PASSED, but the certificates beside it say WARNED",
    ),
}


def mkfifo(path: Path) -> None:
    path.parent.mkdir()
    os.mkfifo(path)


def passed(statement: dict[str, Any]) -> None:
    predicate = statement["predicate"]
    predicate.update(result="PASSED", passedTests=["fold", "reference"], warnedTests=[])


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_named(name: str, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["attest", str(adapter), "--check"]) == 0
    for written in ("README.md", ".git/HEAD", ".cache/huggingface/download/adapter_config.json.metadata"):
        (adapter / written).parent.mkdir(parents=True, exist_ok=True)
        (adapter / written).write_text("a hub, git or a download writes this")
    assert run(cli, ["attest", str(adapter), "--check"]) == 0
    change, words = CHANGES[name]
    change(adapter)
    assert run(cli, ["attest", str(adapter), "--check"]) == 1
    assert words in capsys.readouterr().out
    if IRREGULAR in words:
        assert run(cli, ["attest", str(adapter), "--force"]) == 2
        assert words in capsys.readouterr().err


def add_one(tensors: dict[str, Tensor]) -> None:
    tensors[next(iter(tensors))] += 1


UNCERTIFIED: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed weights": (
        lambda folder: edit_tensors(folder / "adapter_model.safetensors", add_one),
        "is the certificate of another adapter_model.safetensors",
    ),
    "borrowed certificate": (
        lambda folder: edit_json(folder / "adapter_config.json", lambda config: config.update(lora_alpha=1)),
        "is the certificate of another adapter_config.json",
    ),
    "lost template": (
        lambda folder: edit_json(
            folder / "fold_certificate.json", lambda found: found["output"].update({"chat_template.jinja": "0" * 64})
        ),
        "is the certificate of another chat_template.jinja: expected SHA-256 000000000000, found no such file",
    ),
    "written by hand": (
        lambda folder: (folder / "fold_certificate.json").write_text('{"verdict": "passed"}'),
        "names no digests of the output's files",
    ),
}


@pytest.mark.parametrize("name", UNCERTIFIED)
def test_what_no_check_has_seen_is_not_attested(name: str, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (adapter / REFERENCE_FILE).unlink()
    change, words = UNCERTIFIED[name]
    change(adapter)
    before = tree(adapter)
    assert run(cli, ["attest", str(adapter), "--force"]) == 2
    assert f"fold_certificate.json: {words}" in " ".join(capsys.readouterr().err.split())
    assert tree(adapter) == before


def test_a_file_that_nothing_is_of_warns(adapter: Path) -> None:
    (adapter / REFERENCE_FILE).unlink()
    assert run(cli, ["attest", str(adapter), "--force"]) == 0
    assert json.loads((adapter / STATEMENT_FILE).read_text())["predicate"]["result"] == "PASSED"
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    assert run(cli, ["attest", str(adapter), "--force"]) == 0
    found = json.loads((adapter / STATEMENT_FILE).read_text())
    assert (found["predicate"]["result"], found["predicate"]["warnedTests"]) == ("WARNED", ["other files"])
    unchecked = [one["name"] for one in found["subject"] if one["annotations"] == {"checked": False}]
    assert unchecked == ["chat_template.jinja"]


EXPORTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "convert": (("convert", "--check-error"), ("lora_certificate.json",)),
    "shrink": (("shrink", "--rank", "2"), ("lora_certificate.json",)),
    "vllm": (("vllm",), ("preflight.json", "vllm_certificate.json")),
    "converted for vllm": (("vllm",), ("conversion.json", "preflight.json", "vllm_certificate.json")),
    **{verb: ((verb,), (PRODUCTS[verb].certificate,)) for verb in PRODUCTS if verb not in ("fold", "vllm", "onnx")},
}


@pytest.mark.parametrize("name", EXPORTS)
def test_every_certificate_names_all_files_of_its_output(name: str, tmp_path: Path) -> None:
    (verb, *options), certificates = EXPORTS[name]
    if name == "converted for vllm":
        lora = make_source(make_base(tmp_path / "base", "even"), tmp_path / "in", SOURCES["pissa"])
    else:
        lora = save_lora(save_base(tmp_path / "base"), tmp_path / "in")
    (lora / "chat_template.jinja").write_text("{{ messages }}")
    out = tmp_path / "out"
    assert run(cli, [verb, str(lora), "-o", str(out), *options]) == 0
    names = {path.name for path in out.iterdir()} - {"README.md", *certificates}
    assert {"adapter_model.safetensors", "adapters.safetensors", "model.safetensors"} & names
    for certificate in certificates:
        output = json.loads((out / certificate).read_text())["output"]
        assert names <= output.keys()
        assert all(hashlib.sha256((out / file).read_bytes()).hexdigest() == sha256 for file, sha256 in output.items())
    assert run(cli, ["attest", str(out)]) == 0
    assert json.loads((out / STATEMENT_FILE).read_text())["predicate"]["result"] == "PASSED"
    assert run(cli, ["attest", str(out), "--check"]) == 0


def test_what_cannot_be_attested_is_refused(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(cli, ["attest", str(adapter)]) == 2
    assert "exists; compare the files with it by --check" in capsys.readouterr().err
    statement = (adapter / STATEMENT_FILE).rename(adapter.parent / STATEMENT_FILE)
    (adapter / SIGNATURE_FILE).write_text("of somebody else")
    assert run(cli, ["attest", str(adapter)]) == 2
    assert "a new file in the folder would make this signature invalid" in " ".join(capsys.readouterr().err.split())
    assert (adapter / SIGNATURE_FILE).read_text() == "of somebody else"
    statement.rename(adapter / STATEMENT_FILE)
    write_reference(adapter, "0" * 64)
    assert run(cli, ["attest", str(adapter), "--force"]) == 2
    assert "is a recording of an adapter with the digest" in capsys.readouterr().err
    (adapter / REFERENCE_FILE).unlink()
    edit_json(adapter / "fold_certificate.json", lambda content: content.update(verdict="failed"))
    assert run(cli, ["attest", str(adapter), "--force"]) == 1
    (adapter / "fold_certificate.json").unlink()
    assert run(cli, ["attest", str(adapter), "--force"]) == 2
    assert "nothing to attest" in capsys.readouterr().err


@pytest.mark.parametrize("power", [None, [], 5, {"decides": "yes"}])
def test_a_reference_of_unknown_power_is_undecided(power: object, adapter: Path) -> None:
    content = json.loads(gzip.decompress((adapter / REFERENCE_FILE).read_bytes()))
    (adapter / REFERENCE_FILE).write_bytes(gzip.compress(json.dumps(content | {"power": power}).encode()))
    assert run(cli, ["attest", str(adapter), "--force"]) == 0
    assert json.loads((adapter / STATEMENT_FILE).read_text())["predicate"]["warnedTests"] == ["reference"]


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
    pytest.importorskip("model_signing", reason="the extra sign is not installed")
    from cryptography.hazmat.primitives.asymmetric import ec

    mine, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    return (*write_keys(tmp_path / "signing", mine, b"a password"), write_keys(tmp_path / "other", other)[1])


def write_keys(path: Path, key: Any, password: bytes | None = None) -> tuple[Path, Path]:
    """Write a private key and its public key beside each other."""
    from cryptography.hazmat.primitives import serialization as form

    secret = form.NoEncryption() if password is None else form.BestAvailableEncryption(password)
    private, public = path.with_suffix(".pem"), path.with_suffix(".pub")
    private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, secret))
    public.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.mark.parametrize("kind", ["RSA", "Ed25519"])
def test_a_key_of_another_kind_is_named(
    kind: str, adapter: Path, keys: object, capsys: pytest.CaptureFixture[str]
) -> None:
    from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

    key = rsa.generate_private_key(65537, 2048) if kind == "RSA" else ed25519.Ed25519PrivateKey.generate()
    private, public = write_keys(adapter.parent / kind, key)
    before = tree(adapter)
    assert run(cli, ["attest", str(adapter), "--force", "--private-key", str(private)]) == 2
    assert tree(adapter) == before
    (adapter / SIGNATURE_FILE).write_text("{}")
    assert run(cli, ["attest", str(adapter), "--check", "--public-key", str(public)]) == 2
    assert capsys.readouterr().err.count("expected an elliptic-curve key") == 2


MATERIAL = '{"verificationMaterial": {"publicKey": {}}, "dsseEnvelope": {"payload": "", "signatures": []}}'


@pytest.mark.parametrize("content", ["", "[]", "null", "5", "{}", '{"verificationMaterial": 5}', MATERIAL])
def test_a_file_that_is_no_signature_does_not_hold(
    content: str, adapter: Path, keys: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (adapter / SIGNATURE_FILE).write_text(content)
    assert run(cli, ["attest", str(adapter), "--check", "--public-key", str(keys[1])]) == 1
    assert f"{SIGNATURE_FILE}: " in capsys.readouterr().out


def test_a_snapshot_of_the_hub_is_signed(
    adapter: Path, keys: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its files are links into another folder; and what cannot be signed keeps its statement and its signature."""
    from model_signing import signing

    blobs = adapter.rename(adapter.with_name("blobs"))
    adapter.mkdir()
    for path in blobs.iterdir():
        (adapter / path.name).symlink_to(path)
    monkeypatch.setenv("SIGNING_PASSWORD", "a password")
    private, public, _ = map(str, keys)
    sign = ["attest", str(adapter), "--force", "--private-key", private, "--password-variable", "SIGNING_PASSWORD"]
    assert run(cli, sign) == 0
    (adapter / ".cache").mkdir()
    (adapter / ".cache" / "metadata").write_text("of a download")
    assert run(cli, ["attest", str(adapter), "--check", "--public-key", public]) == 0
    before = tree(adapter)

    def fail(*_: object) -> None:
        raise ValueError("this cannot be hashed")

    monkeypatch.setattr(signing.Config, "sign", fail)
    (adapter / "adapter_config.json").write_text((blobs / "adapter_config.json").read_text())
    assert run(cli, sign) == 2
    assert "cannot be signed: this cannot be hashed" in capsys.readouterr().err
    assert tree(adapter) == before


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
