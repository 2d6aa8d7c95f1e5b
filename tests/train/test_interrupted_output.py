"""Ctrl-C at every moment of a publication leaves the old output or the new one, and no draft beside it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

from loraover.common.atomic_output import publish_directory, publish_file

from support.make_checkpoint import tree
from support.output_drafts import fill, fill_old


def interrupted_at(moment: int, publish: Callable[[Path], object], target: Path) -> bool:
    """Interrupt a publication at one of the moments at which Python handles signals; False if it ended before that.

    These moments are the starts of functions written in Python and the ends of those written in C.
    """
    passed = 0

    def notice(frame: FrameType, event: str, function: object) -> None:
        nonlocal passed
        if event in ("call", "c_return") and frame.f_code.co_filename != __file__:
            passed += 1
            if passed == moment:
                raise KeyboardInterrupt

    sys.setprofile(notice)
    try:
        publish(target)
    except BaseException:  # its own, or the error of a file that a library closed once more
        return True
    finally:
        sys.setprofile(None)
    return False


def make_file(target: Path) -> None:
    publish_file(target, lambda draft: draft.write_text("new"))


def make_folder(target: Path) -> None:
    with publish_directory(target) as draft:
        fill(draft)


def replace_folder(target: Path) -> None:
    with publish_directory(target, replace=True) as draft:
        fill(draft)


@pytest.mark.parametrize(("publish", "has_old"), [(make_file, False), (make_folder, False), (replace_folder, True)])
def test_an_interrupt_leaves_all_or_nothing(publish: Callable[[Path], object], has_old: bool, tmp_path: Path) -> None:
    def begun(name: str) -> Path:
        (tmp_path / name).mkdir()
        if has_old:
            fill_old(tmp_path / name / "out")
        return tmp_path / name

    old = tree(begun("old"))
    publish(begun("new") / "out")  # the expressions for hidden names are compiled here, not at the moments below
    new = tree(tmp_path / "new")
    moment = 1
    while interrupted_at(moment, publish, begun(str(moment)) / "out"):
        assert tree(tmp_path / str(moment)) in (old, new), moment
        moment += 1
    assert tree(tmp_path / str(moment)) == new
    assert moment > 200
