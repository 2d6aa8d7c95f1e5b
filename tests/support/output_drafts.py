"""Drafts of outputs, filled, and ended in several ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraover.common.atomic_output import publish_directory


class Interrupted(BaseException):
    """Stands for whatever may end a block."""


ENDINGS = [KeyboardInterrupt(), Interrupted(), ValueError("no"), MemoryError(), SystemExit(3)]


def kind(error: BaseException) -> str:
    return type(error).__name__


def fill(draft: Path) -> None:
    (draft / "inner").mkdir()
    (draft / "inner" / "a").write_bytes(b"\x00one")
    (draft / "b").write_text("two")


def publish(target: Path, then: Callable[[Path], object] = lambda draft: None, **options: Any) -> None:
    """Fills a draft and may do something more before its block ends."""
    with publish_directory(target, **options) as draft:
        fill(draft)
        then(draft)


def raiser(error: BaseException) -> Callable[[Path], None]:
    def then(draft: Path) -> None:
        raise error

    return then


def fill_old(folder: Path) -> None:
    folder.mkdir()
    (folder / "stale").write_text("old")
