"""The seal of a checkpoint: its digest and checksums, and a save that was cut off before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraover import read_checkpoint, write_checkpoint
from loraover.checkpoint.files import CORES_FILE, META_FILE
from loraover.common.atomic_output import publish_file
from loraover.common.errors import CheckpointError, OutputError

from support.make_checkpoint import digest, edit_json, make_checkpoint, train


@pytest.mark.parametrize("stage", [1, 2])
def test_a_save_that_is_cut_off_leaves_no_checkpoint(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_checkpoint(tmp_path, steps=0)
    fresh = tmp_path / "fresh"
    made.model.save_pretrained(fresh)
    calls = []

    def full(path: Path, fill: Callable[[Path], object]) -> None:
        calls.append(path)
        if len(calls) == stage:
            raise OutputError(f"cannot write {path}: No space left on device.")
        publish_file(path, fill)

    for module in ("loraover.checkpoint.write_checkpoint", "loraover.common.atomic_output"):
        monkeypatch.setattr(f"{module}.publish_file", full)
    with pytest.raises(OutputError, match="No space left"):
        write_checkpoint(fresh, made.over, step=0)
    assert [path.name for path in calls] == [CORES_FILE, META_FILE][:stage]
    with pytest.raises(CheckpointError, match="the saving of a checkpoint was interrupted"):
        read_checkpoint(fresh)


def test_a_newer_adapter_beside_older_cores_is_refused(tmp_path: Path) -> None:
    made = make_checkpoint(tmp_path)
    train(made.model, made.optimizer, range(2, 3))
    made.model.save_pretrained(made.path)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: its SHA-256 differs"):
        read_checkpoint(made.path)
    write_checkpoint(made.path, made.over, step=3)
    assert read_checkpoint(made.path).meta.step == 3


@pytest.mark.parametrize("lacking", ["digest", "checksum"])
def test_a_checkpoint_that_lacks_a_seal_is_refused(lacking: str, tmp_path: Path) -> None:
    """An edit is found whether it empties the digest or leaves it."""
    made = make_checkpoint(tmp_path, steps=0)

    def take_away(meta: dict[str, Any]) -> None:
        if lacking == "checksum":
            del meta["sha256"][CORES_FILE]
        meta["digest"] = "" if lacking == "digest" else digest(meta)

    edit_json(made.path / META_FILE, take_away)
    place = META_FILE if lacking == "digest" else CORES_FILE
    with pytest.raises(CheckpointError, match=rf"{place}: its (digest|SHA-256)"):
        read_checkpoint(made.path)
