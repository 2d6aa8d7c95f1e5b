"""Output is complete or absent."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from loraover.common.atomic_output import check_file_writable, publish_directory, publish_file
from loraover.common.errors import OutputError

from support.machine import without_links
from support.make_checkpoint import tree
from support.output_drafts import ENDINGS, fill, fill_old, kind, publish, raiser


@pytest.fixture
def umask() -> Iterator[int]:
    old = os.umask(0o027)
    yield 0o027
    os.umask(old)


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    target = tmp_path / "new" / "parents" / "out"
    with publish_directory(target) as draft:
        fill(draft)
        assert not target.exists()
        assert draft.parent == target.parent
    assert (target / "inner" / "a").read_bytes() == b"\x00one"
    assert set(tree(target)) == {"inner", "inner/a", "b"}
    assert list(target.parent.iterdir()) == [target]


def test_the_umask_is_obeyed_without_being_changed(tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change would be seen by the process's other threads, whose files would be open to all."""

    def change(mask: int) -> int:
        pytest.fail("the umask was changed")

    def keep_private(draft: Path) -> None:
        (draft / "b").chmod(0o600)

    monkeypatch.setattr(os, "umask", change)
    publish(tmp_path / "out", keep_private)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE((tmp_path / "out" / "b").stat().st_mode) == 0o666 & ~umask
    assert set(tree(tmp_path / "out")) == {"inner", "inner/a", "b"}


def make_file(target: Path) -> None:
    publish_file(target, lambda draft: draft.write_text("new"))


def publish_half(target: Path, then: Callable[[Path], object]) -> None:
    publish_file(target, lambda draft: [draft.write_text("half"), then(draft)], parents=True)


WAYS: dict[str, tuple[Callable[..., None], Callable[[Path], object]]] = {
    "a folder": (publish, lambda target: None),
    "a replaced folder": (partial(publish, replace=True), fill_old),
    "a file, and its parents": (publish_half, lambda target: target.parent.rmdir()),
    "a replaced file": (publish_half, lambda target: target.write_text("old")),
}
"""How a target is written, and how what is there before comes about."""


@pytest.mark.parametrize("ending", ENDINGS, ids=kind)
@pytest.mark.parametrize("way", WAYS)
def test_a_block_that_raises_leaves_what_was_there(way: str, ending: BaseException, tmp_path: Path) -> None:
    write, begin = WAYS[way]
    (tmp_path / "parent").mkdir()
    begin(target := tmp_path / "parent" / "out")
    before = tree(tmp_path)
    with pytest.raises(type(ending)):
        write(target, raiser(ending))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES])
def test_a_failed_write_becomes_one_message_and_leaves_nothing(code: int, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(OutputError, match=f"cannot write {target}: {os.strerror(code)}"):
        publish(target, raiser(OSError(code, os.strerror(code))))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_read_is_no_output_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "out", lambda draft: (tmp_path / "input").read_bytes())
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=["folder", "empty folder", "file", "link", "dangling link"])
def taken(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    target = tmp_path / "out"
    match request.param:
        case "folder":
            (target / "inner").mkdir(parents=True)
        case "empty folder":
            target.mkdir()
        case "file":
            target.write_text("mine")
        case "link":
            (tmp_path / "elsewhere").mkdir()
            target.symlink_to(tmp_path / "elsewhere")
        case _:
            target.symlink_to(tmp_path / "nowhere")
    return target


def test_an_existing_destination_is_refused_untouched(taken: Path, tmp_path: Path) -> None:
    """Only a folder is replaced, and only where that is asked for."""
    before = tree(tmp_path)
    for replace in [False] if taken.is_dir() and not taken.is_symlink() else [False, True]:
        with pytest.raises(OutputError, match=f"{taken} exists already"), publish_directory(taken, replace=replace):
            pytest.fail("the block ran")
    assert tree(tmp_path) == before


def test_a_destination_made_meanwhile_is_left_untouched(tmp_path: Path) -> None:
    def overtake(draft: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("first")

    with pytest.raises(OutputError, match="exists already"):
        publish(tmp_path / "out", overtake)
    assert set(tree(tmp_path)) == {"out", "out/theirs"}


@pytest.mark.parametrize("inside", ["out", "deep/out", "link/out", "../input/out"])
def test_a_destination_inside_the_input_is_refused(inside: str, tmp_path: Path) -> None:
    source = tmp_path / "input"
    source.mkdir()
    (tmp_path / "input" / "link").symlink_to(source)
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="lies inside the input"), publish_directory(source / inside, outside=source):
        pytest.fail("the block ran")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("write", [partial(publish, outside=Path("/input")), publish_half], ids=["folder", "file"])
@pytest.mark.parametrize("name", ["file/out", "file/deep/out", "folder", "loop/out", "n" * 300], ids=lambda n: n[:13])
def test_an_unusable_destination_is_an_output_error(name: str, write: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = tree(tmp_path)
    with pytest.raises(OutputError):
        write(tmp_path / name, lambda draft: None)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("write", "parts"),
    [(make_file, [""]), (publish, ["", "b", "inner", "inner/a"])],
    ids=["file", "folder"],
)
def test_contents_are_on_disk_before_the_name_is(
    write: Callable[[Path], None], parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is named first can be empty after a power cut."""
    events: list[tuple[str, Path]] = []
    fsync = os.fsync

    def recorded_fsync(descriptor: int) -> None:
        events.append(("on disk", Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def recorded(move: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def moved(draft: Path, target: Path) -> Path:
            events.append(("named", draft))
            return move(draft, target)

        return moved

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, recorded(getattr(Path, name)))
    write(tmp_path / "out")
    (draft,) = (path for event, path in events if event == "named")
    assert draft != tmp_path / "out"
    assert sorted(events[:-2]) == sorted(("on disk", draft / part) for part in parts)
    assert events[-2:] == [("named", draft), ("on disk", tmp_path)]


@pytest.mark.parametrize("old", [None, "old"])
def test_a_file_is_replaced_whole(old: str | None, tmp_path: Path) -> None:
    target = tmp_path / "file"
    if old is not None:
        target.write_text(old)

    def write(draft: Path) -> None:
        draft.write_text("new, half")
        assert (target.read_text() if target.exists() else None) == old
        draft.write_text("new")

    publish_file(target, write)
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.fixture(params=["hard links", "no hard links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "no hard links":
        without_links(monkeypatch)


def assert_stays(target: Path, write: Callable[[Path], object]) -> None:
    with pytest.raises(OutputError, match="exists already and is a file"):
        publish_file(target, write, replace=False)
    assert {path: path.read_text() for path in target.parent.iterdir()} == {target: "theirs"}


@pytest.mark.usefixtures("links")
def test_a_file_that_another_command_wrote_meanwhile_stays(tmp_path: Path) -> None:
    target = tmp_path / "file"

    def write(draft: Path) -> None:
        draft.write_text("ours")
        target.write_text("theirs")

    assert_stays(target, write)
    publish_file(target, write)
    assert target.read_text() == "ours"


@pytest.mark.usefixtures("links")
def test_a_file_that_another_command_wrote_at_the_last_moment_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, link = tmp_path / "file", os.link

    def late_link(*args: Any, **kwargs: Any) -> None:
        target.write_text("theirs")
        link(*args, **kwargs)

    monkeypatch.setattr(os, "link", late_link)
    assert_stays(target, lambda draft: draft.write_text("ours"))


@pytest.mark.usefixtures("links")
def test_a_file_takes_a_free_place(tmp_path: Path) -> None:
    publish_file(tmp_path / "file", lambda draft: draft.write_text("new"), replace=False)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "new"}
    assert (tmp_path / "file").stat().st_nlink == 1


def test_missing_parents_of_a_file_are_made_where_they_are_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "file"
    with pytest.raises(OutputError):
        publish_file(target, lambda draft: draft.write_text("new"))
    check_file_writable(target, parents=True)
    assert tree(tmp_path) == {}
    publish_file(target, lambda draft: draft.write_text("new"), parents=True)
    assert target.read_text() == "new"


def test_one_message_about_one_failure(tmp_path: Path) -> None:
    """What `save_tensors` raises inside of `publish_file` is not wrapped once more."""

    def write(draft: Path) -> None:
        raise OutputError("cannot write the tensors: full. Nothing was left there.")

    with pytest.raises(OutputError) as caught:
        publish_file(tmp_path / "file", write)
    assert str(caught.value).count("cannot write") == 1


# Ctrl-C at every moment


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


@pytest.mark.parametrize(
    ("publish", "has_old"),
    [(make_file, False), (publish, False), (partial(publish, replace=True), True)],
    ids=["file", "folder", "replaced folder"],
)
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
