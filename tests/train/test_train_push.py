"""`loraover train` pushes an adapter to the hub when it is asked to."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from loraover.training.run_result import read_run

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
