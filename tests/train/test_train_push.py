"""`loraover train` pushes an adapter to the hub when it is asked to."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError

from loraover.checkpoint.carried_reference import misfit
from loraover.checkpoint.reference_file import REFERENCE_FILE
from loraover.models.load import ModelSource
from loraover.training.push import moved_copy
from loraover.training.run_result import read_run

from support.plain_adapter import write_adapter
from support.recorded import write_reference
from support.train_command import STEPS, train

pytestmark = [pytest.mark.process, pytest.mark.usefixtures("no_network")]


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, set[str]]]:
    """What was asked of the hub's API: the call, the repository and the files."""
    calls: list[tuple[str, str, set[str]]] = []

    def create_repo(self: Any, repo_id: str, **_: Any) -> None:
        calls.append(("create_repo", repo_id, set()))

    def upload_folder(self: Any, *, repo_id: str, folder_path: Path, **_: Any) -> None:
        calls.append(("upload_folder", repo_id, {path.name for path in Path(folder_path).iterdir()}))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return calls


def test_the_adapter_is_pushed_when_asked_for(
    recipe: Path, tmp_path: Path, uploads: list[tuple[str, str, set[str]]]
) -> None:
    assert train(recipe, tmp_path / "out", "--set", "push_to_hub=me/adapter") == 0
    assert [call[:2] for call in uploads] == [("create_repo", "me/adapter"), ("upload_folder", "me/adapter")]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= uploads[1][2]
    assert not {"optimizer.pt", "training_args.bin", "recipe.yaml"} & uploads[1][2]


RESPONSE: Any = SimpleNamespace(headers={}, request=None)
HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""What the hub's client raises without a connection, whichever HTTP library it is built on."""

PUSH_ERRORS: dict[str, Exception] = {
    "refused": HfHubHTTPError("401 Unauthorized", response=RESPONSE),
    "no connection": HTTP_ERROR("no route"),
}


@pytest.mark.parametrize("error", PUSH_ERRORS.values(), ids=list(PUSH_ERRORS))
def test_a_push_that_fails_keeps_the_run(
    error: Exception,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    uploads: list[tuple[str, str, set[str]]],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    assert train(recipe, tmp_path / "out", "--set", "push_to_hub=me/adapter") == 2
    assert "me/adapter" in capsys.readouterr().err
    assert read_run(tmp_path / "out").steps == STEPS
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_reference_is_recorded_beside_the_adapter_and_pushed_with_it(
    recipe: Path, tmp_path: Path, uploads: list[tuple[str, str, set[str]]]
) -> None:
    assert train(recipe, tmp_path / "out", "--record", "--set", "push_to_hub=me/adapter") == 0
    assert misfit(tmp_path / "out" / "adapter" / REFERENCE_FILE) is None
    assert REFERENCE_FILE in uploads[1][2]
    assert "--record" in (tmp_path / "out" / "adapter" / "README.md").read_text()


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
    assert "was recorded of an adapter with the digest" in said[0]


def test_full_training_has_no_reference(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(recipe, tmp_path / "out", "--record", "--method", "full") == 2
    assert "--record: method full trains no adapter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
