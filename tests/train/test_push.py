"""What train, fold and export upload, to a stand-in of the hub that the hub's own client talks to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

import loraover
from loraover.checkpoint.carried_files import misfit
from loraover.checkpoint.files import CORES_FILE, META_FILE, REFERENCE_FILE
from loraover.cli import cli
from loraover.common.command_line import run
from loraover.common.errors import ConfigError
from loraover.models.load import ModelSource
from loraover.training.push import moved_copy, proofs
from loraover.training.run_result import read_run

from support.hub_server import HubServer, hub_server
from support.machine import with_hub
from support.plain_adapter import write_adapter
from support.plugin import make_checkpoint_on
from support.recorded import write_reference
from support.train_command import STEPS, train
from support.trained_run import matrices

pytestmark = pytest.mark.process

PLAIN = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
CERTIFICATE = "fold_certificate.json"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A stand-in to which this process uploads too, although the hub's client read HF_ENDPOINT when it was imported."""
    with hub_server() as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        with_hub(monkeypatch, ENDPOINT=running.url, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True)
        yield running


@pytest.mark.parametrize(("name", "message"), [("a b", "a b"), ("me/adapter", "nobody is logged in to the hub here")])
def test_what_cannot_be_uploaded_is_refused_before_the_training(
    name: str, message: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with_hub(monkeypatch, HF_TOKEN_PATH=str(tmp_path / "token"))
    with pytest.raises(ConfigError, match=f"push_to_hub: .*{message}"):
        loraover.train(str(recipe), tmp_path / "out", overrides={"push_to_hub": name})
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_run_uploads_its_plain_lora_with_card_certificate_and_reference(
    recipe: Path, tmp_path: Path, hub: HubServer
) -> None:
    out, there = tmp_path / "out", tmp_path / "there"
    words = ["train", str(recipe), "-o", str(out), "--record", "--push-to-hub", "me/adapter"]
    call = [sys.executable, "-c", "from loraover.cli import main; main()", *words]
    ran = subprocess.run(call, env=os.environ | hub.environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    names = {path.name for path in hub.write("me/adapter", there).iterdir()}
    assert {*PLAIN, CERTIFICATE, REFERENCE_FILE, "tokenizer.json"} <= names
    assert not names & {META_FILE, CORES_FILE, "fold.html", "optimizer.pt", "recipe.yaml"}
    assert misfit(there / REFERENCE_FILE) is None
    assert [path.name for path in proofs(there)] == [CERTIFICATE, REFERENCE_FILE]  # what trackers are given
    assert json.loads((there / CERTIFICATE).read_text())["verdict"] == "passed"
    assert (there / "README.md").read_text() == (out / "adapter" / "README.md").read_text()
    pushed = load_file(there / "adapter_model.safetensors")
    torch.testing.assert_close(pushed, matrices(out))  # folded from the cores, so rounded again
    assert PeftConfig.from_pretrained(str(there)).peft_type == "LORA"
    assert (out / "adapter" / CORES_FILE).is_file()


def test_the_cores_are_uploaded_when_asked_for(recipe: Path, tmp_path: Path, hub: HubServer) -> None:
    assert train(recipe, tmp_path / "out", "--push-to-hub", "me/adapter", "--push-checkpoint") == 0
    files = hub.repositories["me/adapter"]
    assert {f"checkpoint/{name}" for name in (CORES_FILE, META_FILE, *PLAIN)} <= files.keys()
    assert CORES_FILE not in files
    assert files[f"checkpoint/{CORES_FILE}"] == (tmp_path / "out" / "adapter" / CORES_FILE).read_bytes()
    assert hub.private == set()


def test_a_plain_lora_is_uploaded_as_it_is(recipe: Path, tmp_path: Path, hub: HubServer) -> None:
    words = ("--method", "lora", "--push-to-hub", "me/adapter", "--private")
    assert train(recipe, tmp_path / "out", *words) == 0
    assert hub.private == {"me/adapter"}
    files = hub.repositories["me/adapter"]
    assert CERTIFICATE not in files
    for name in PLAIN:
        assert files[name] == (tmp_path / "out" / "adapter" / name).read_bytes()


def test_an_upload_that_is_refused_keeps_the_run(
    recipe: Path, tmp_path: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(recipe, tmp_path / "out", "--method", "lora", "--push-to-hub", "other/adapter") == 2
    told = capsys.readouterr().err
    for part in ("--push-to-hub", "other/adapter", "rights", str(tmp_path / "out" / "adapter")):
        assert part in told
    assert read_run(tmp_path / "out").steps == STEPS
    assert hub.commits == []


def test_a_fold_and_an_export_upload_what_they_write(bases: dict[str, Path], tmp_path: Path, hub: HubServer) -> None:
    make_checkpoint_on(bases["llama"], checkpoint := tmp_path / "checkpoint")
    write_reference(checkpoint)
    for verb, certificate in (("fold", CERTIFICATE), ("vllm", "vllm_certificate.json")):
        out, repository = tmp_path / verb, f"me/{verb}"
        words = ["export", verb, str(checkpoint), "-o", str(out), "--push-to-hub", repository]
        assert run(cli, [*words, "--private"] if verb == "fold" else words) == 0
        files = hub.repositories[repository]
        assert {*PLAIN, certificate, REFERENCE_FILE} <= files.keys()
        assert not files.keys() & {CORES_FILE, "fold.html"}
        for name, content in files.items():
            assert content == (out / name).read_bytes()
        assert misfit(hub.write(repository, tmp_path / f"{verb}-there") / REFERENCE_FILE) is None
    assert hub.private == {"me/fold"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--push-checkpoint", "--method", "lora", "--push-to-hub", "me/a"], "--push-checkpoint uploads the cores"),
        (["--push-checkpoint"], "--push-checkpoint uploads the cores"),
        (["--record", "--method", "full"], "--record: method full trains no adapter"),
    ],
)
def test_what_a_run_does_not_make_is_refused_first(
    words: list[str], message: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(recipe, tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_names_another_base_model_keeps_its_reference(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", {"layer": (torch.ones(1, 2), torch.ones(2, 1))})
    write_reference(tmp_path / "adapter")
    base = ModelSource("owner/name", "owner/name", None, "the hub")
    with moved_copy(tmp_path / "adapter", base, "card", pytest.fail) as copy:
        assert json.loads((copy / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/name"
        assert misfit(copy / REFERENCE_FILE) is None
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 9, "lora_alpha": 9}')
    said: list[str] = []
    with moved_copy(tmp_path / "adapter", base, "card", said.append) as copy:
        assert not (copy / REFERENCE_FILE).exists()
    assert "is a recording of an adapter with the digest" in said[0]
