"""Paths that the system cannot look at: too long, or below a folder that may not be entered."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loraover import inspect_folder, read_checkpoint
from loraover.checkpoint.peft_adapter import read_adapter_dir
from loraover.checkpoint.source import read_source
from loraover.common.errors import ConfigError
from loraover.common.paths import kind_of
from loraover.data.sources import read_raw
from loraover.models.load import resolve_model
from loraover.models.stand_in import find_stand_in
from loraover.training.recipe import load_recipe
from loraover_export import check_adapter, convert_adapter
from loraover_export.formats.gguf.run import check_output
from loraover_export.requests import GgufRequest

from support.children import Child, become_nobody

LONG = "x" * 300
READERS: dict[str, Callable[[str], Any]] = {
    "inspect": inspect_folder,
    "model": resolve_model,
    "data": lambda name: read_raw(name, split="train"),
    "recipe": load_recipe,
    "adapter": lambda name: read_adapter_dir(Path(name)),
    "checkpoint": read_checkpoint,
    "checkpoint or adapter": lambda name: read_source(Path(name)),
    "adapter of any kind": lambda name: convert_adapter(name, "out"),
    "checked adapter": check_adapter,
    "GGUF output": lambda name: check_output(GgufRequest(Path("in"), Path(name))),
}


def test_a_path_leads_to_a_file_a_folder_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    found = [kind_of(tmp_path / name) for name in ("file", "", "none", "file/below", "pipe", "null\0")]
    assert found == ["file", "folder", None, None, None, None]


@pytest.mark.parametrize("reader", READERS)
def test_a_path_that_is_too_long_is_refused(reader: str) -> None:
    with pytest.raises(ConfigError, match=r"xxx[^:]*: cannot be accessed: File name too long"):
        READERS[reader](f"./{LONG}")


@pytest.mark.parametrize("reader", READERS)
def test_a_folder_that_may_not_be_entered_is_refused(reader: str, tmp_path: Path) -> None:
    """By a user whom it keeps out, as it does not root."""
    (tmp_path / "in").mkdir(mode=0)

    def refused() -> int:
        with pytest.raises(ConfigError, match=r"in/it.*: cannot be accessed: Permission denied"):
            READERS[reader](str(tmp_path / "in" / "it"))
        return 0

    assert (ended := Child(refused, prepare=become_nobody).end()).code == 0, ended.output


def test_no_stand_in_lies_where_nobody_can_look() -> None:
    assert find_stand_in(LONG) is None
