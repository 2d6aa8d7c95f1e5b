"""Sealed references, references of 16-bit models, and references that travel with their adapter."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from loraover.checkpoint.files import REFERENCE_FILE
from loraover.common.command_line import run
from loraover.common.errors import CheckpointError
from loraover_serve.cli import cli
from loraover_serve.comparison.rounding import FORMATS
from loraover_serve.verify.by_reference import check_seal

from support.openai_server import openai_server
from support.recorded import LINES
from support.verified import FAULTS as WRONG
from support.verified import Served, plant

SECRET = tuple(line[::-1] for line in LINES)


@pytest.fixture(scope="module")
def audited(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The published reference of an adapter, and its sealed one in another folder."""
    folder = tmp_path_factory.mktemp("audited")
    (folder / "public").mkdir()
    (folder / "public.txt").write_text("\n".join(LINES))
    (folder / "secret.txt").write_text("\n".join(SECRET))
    published, sealed = folder / "public" / REFERENCE_FILE, folder / "sealed.json.gz"
    words = ["--prompts", folder / "public.txt", "--sealed", sealed, "--sealed-prompts", folder / "secret.txt"]
    command = ["record", adapter, "--model", base, "-o", published, "--device", "cpu", *words]
    assert run(cli, [str(word) for word in command]) == 0
    return published, sealed


def content(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return found


def test_a_published_reference_has_the_digest_of_the_sealed_one_alone(audited: tuple[Path, Path]) -> None:
    published, sealed = map(content, audited)
    assert published["digests"]["sealed"] == hashlib.sha256(audited[1].read_bytes()).hexdigest()
    asked = [{tuple(question["prompt"]) for question in one["questions"]} for one in (published, sealed)]
    assert not asked[0] & asked[1]
    assert "salt" not in published
    assert len(bytes.fromhex(sealed["salt"])) == 32


def test_a_sealed_reference_that_was_changed_is_refused(
    audited: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published, sealed = audited
    check_seal(sealed, published)
    changed = tmp_path / "sealed.json.gz"
    changed.write_bytes(gzip.compress(json.dumps(content(sealed) | {"effect": 1.0}).encode()))
    words = ["verify", "--endpoint", "http://localhost:9", "--served-name", "shop", "--reference", str(changed)]
    assert run(cli, [*words, "--published", str(published)]) == 2
    assert "it was changed, or seals another adapter" in capsys.readouterr().err
    (tmp_path / REFERENCE_FILE).write_bytes(published.read_bytes())
    assert run(cli, words) == 2
    assert f"{tmp_path / REFERENCE_FILE} names" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="names no sealed reference"):
        check_seal(published, sealed)


@pytest.mark.parametrize("inside", ["adapter", "output"])
def test_a_sealed_reference_is_not_written_where_it_would_be_published(
    inside: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret.txt").write_text("a")
    folder = {"adapter": adapter, "output": tmp_path}[inside]
    words = ["record", str(adapter), "-o", str(tmp_path / "a.json.gz"), "--sealed", str(folder / "sealed.json.gz")]
    assert run(cli, [*words, "--sealed-prompts", str(tmp_path / "secret.txt")]) == 2
    assert "would be published with the adapter" in capsys.readouterr().err
    assert run(cli, words) == 2
    assert "--sealed needs --sealed-prompts" in capsys.readouterr().err
    secret = str(tmp_path / "secret.txt")
    outside = ["--sealed", str(tmp_path.parent / "sealed.json.gz"), "--sealed-prompts", secret, "--prompts", secret]
    assert run(cli, [*words[:4], *outside]) == 2
    assert "has the published questions" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_reference_in_16_bits_knows_its_noise(dtype: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    """A right server in float32 has its verdict; rounding of PyTorch's own is part of every format's distance."""
    (tmp_path / "questions.txt").write_text("\n".join(LINES))
    written = tmp_path / "reference.json.gz"
    words = ["record", adapter, "--model", base, "-o", written, "--device", "cpu", "--compute-dtype", dtype]
    assert run(cli, [str(word) for word in (*words, "--prompts", tmp_path / "questions.txt")]) == 0
    found = content(written)
    assert found["made"]["compute_dtype"] == dtype
    assert found["formats"].keys() == FORMATS.keys()
    wrong = plant(WRONG["rsLoRA ignored"], adapter, tmp_path / "wrong")
    served = Served(base, {"base": None, "shop": adapter, "wrong": wrong})
    with openai_server(served, ("base", "shop", "wrong")) as server:
        for name, code in (("shop", 0), ("wrong", 1)):
            words = ["verify", "--reference", written, "--endpoint", server.url, "--served-name", name]
            assert run(cli, [str(word) for word in (*words, "--base-name", "base")]) == code
