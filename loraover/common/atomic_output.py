"""Atomic output: complete or absent, since it is written beside its destination, synced and then renamed.

    .NAME.XXXXXXXX.tmp   draft: the folder in which the output NAME is being made
    .NAME.XXXXXXXX.old   the former output NAME, while a new folder takes its place

A process holds a lock on these folders as long as it lives. A folder without a lock was left by a process that was
killed. The next run with the same output removes it, or renames an old folder back if no new one has taken its place.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from loraover.common.errors import LoraOverError, OutputError
from loraover.common.request import as_written

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def publish_directory(
    destination: str | os.PathLike[str], *, outside: Path | None = None, replace: bool = False
) -> Iterator[Path]:
    """Make a new folder to fill, and rename it to `destination` if the block ends without an exception.

    Args:
        destination: Path of the new folder. It must not exist; missing parents are made.
        outside: Folder in which the destination may not lie, such as the command's input.
        replace: Whether to replace a folder that exists: it is renamed at the end, and removed once the new one is in
            its place. If the process is killed between the two renames, the next run with this destination restores it.

    Yields:
        A temporary folder beside the destination, which is removed if the block raises. `AbandonedError` ends the block
        without an output, and goes no further.

    Raises:
        OutputError: The destination exists, lies in `outside`, or cannot be written (no permission, no space); or, with
            `replace`, it is not a folder, or `outside` lies in it.
    """
    target = Path(destination).absolute()
    for aside in _left(target, "old"):  # of a replacement that was killed half-way
        with suppress(OSError), _locked(aside):
            if target.exists() or target.is_symlink():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.rename(target)
    check_free(target, outside=outside, replace=replace)
    draft = target.parent
    try:
        with _parents_made(target), _drafted(target) as draft:
            yield draft
            mode = _file_mode(draft)
            for path in sorted(draft.rglob("*")):
                if path.is_file():
                    path.chmod(mode)  # some libraries keep their files to themselves, servers run as others
                sync(path)
            sync(draft)
            _put_in_place(draft, target, replace)
            sync(target.parent)
    except AbandonedError:
        return
    except Exception as error:
        failure = _as_os_error(error)
        if failure is None or not _is_about(failure, draft):
            raise
        raise _output_error(target, failure) from error


class AbandonedError(Exception):
    """Raised to end a block, or a function that fills a file, without an output; `publish_*` then return as usual."""


def check_writable(destination: str | os.PathLike[str], *, outside: Path | None = None) -> None:
    """Raise OutputError unless `publish_directory` can write there; no file or folder is left behind."""
    with publish_directory(destination, outside=outside):
        raise AbandonedError


def _put_in_place(draft: Path, target: Path, replace: bool) -> None:
    check_free(target, replace=replace)
    if not target.exists():
        draft.rename(target)
        return
    aside = draft.with_suffix(".old")
    with ExitStack() as lock:
        with suppress(OSError):  # a file system without locks, or one that another replacement holds already
            lock.enter_context(_locked(target))
        try:
            target.rename(aside)
            draft.rename(target)
            shutil.rmtree(aside, ignore_errors=True)
        except BaseException:
            if target.exists():
                shutil.rmtree(aside, ignore_errors=True)
            elif aside.exists():
                aside.rename(target)
            raise


@contextmanager
def _parents_made(target: Path) -> Iterator[None]:
    """Make the missing folders above `target` for a block: kept and synced after it, removed if it raises."""
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise
    for parent in made:
        sync(parent.parent)


@contextmanager
def _drafted(target: Path) -> Iterator[Path]:
    """Make a locked hidden folder beside `target`, removed after the block; drafts of killed processes are removed."""
    for left in _left(target, "tmp"):
        with suppress(OSError), _locked(left):
            shutil.rmtree(left, ignore_errors=True)
    draft = target.with_name(f".{_stem(target)}.{secrets.token_hex(4)}.tmp")
    try:
        with ExitStack() as lock:
            while True:
                draft.mkdir(exist_ok=True)
                try:
                    lock.enter_context(_locked(draft))
                except (BlockingIOError, FileNotFoundError):
                    continue  # another run found it without a lock and is removing it
                except OSError:
                    pass  # a file system without locks, where nobody removes drafts
                break
            yield draft
    finally:
        try:
            shutil.rmtree(draft, ignore_errors=True)
        except BaseException:  # such as Ctrl-C in the midst of it
            shutil.rmtree(draft, ignore_errors=True)
            raise


def _left(target: Path, ending: str) -> list[Path]:
    """Return the hidden folders of `target` with an ending, in use or left by a killed process, the newest first."""
    named = re.compile(rf"\.{re.escape(_stem(target))}\.[0-9a-f]{{8}}\.{ending}")
    try:
        found = [path for path in target.parent.iterdir() if named.fullmatch(path.name)]
        return sorted(found, key=lambda path: path.lstat().st_ctime_ns, reverse=True)
    except OSError:
        return []


def _stem(target: Path) -> str:
    """Return the output's name as its hidden folders contain it; a digest if the name is too long to be extended."""
    name = os.fsencode(target.name)
    return target.name if len(name) <= 200 else hashlib.sha256(name).hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock for a block; OSError if it is held already, the folder is gone, or there are no locks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        yield
    finally:
        os.close(descriptor)


def publish_file(
    path: str | os.PathLike[str], fill: Callable[[Path], object], *, parents: bool = False, replace: bool = True
) -> None:
    """Write one file, completely or not at all.

    Args:
        path: The file.
        fill: Function that writes the new content to the temporary path that it is given. If it raises
            `AbandonedError`, the file stays as it was.
        parents: Whether to make missing parents, which are removed if the file is not written.
        replace: Whether to replace a file that is there, also one that was written while `fill` ran.

    Raises:
        OutputError: The file cannot be written, or it is there and may not be replaced.
    """
    target = Path(path).absolute()
    try:
        with _parents_made(target) if parents else nullcontext(), _drafted(target) as folder:
            draft = folder / target.name
            fill(draft)
            sync(draft)
            if replace:
                draft.replace(target)
            else:
                check_free(target)
                try:
                    target.hardlink_to(draft)  # replaces nothing, as a rename would
                except OSError:  # another command was faster, or the file system has no hard links
                    check_free(target)
                    draft.rename(target)
            sync(target.parent)
    except AbandonedError:
        return
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise _output_error(target, error) from error


def publish_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace one file by a text in UTF-8; raises as `publish_file` does."""
    publish_file(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def check_file_writable(path: str | os.PathLike[str], *, parents: bool = False) -> None:
    """Raise OutputError unless `publish_file` can write there; no file is left behind."""

    def begin(draft: Path) -> None:
        draft.touch()
        raise AbandonedError

    publish_file(path, begin, parents=parents)


def check_free(target: Path, *, outside: Path | None = None, replace: bool = False) -> None:
    """Raise OutputError unless a new folder can be made at `target`, or replace the one there if `replace` is true."""
    try:
        occupied = target.exists() or target.is_symlink()
    except OSError as error:
        raise _output_error(target, error) from error
    replaceable = replace and target.is_dir() and not target.is_symlink()
    if occupied and not replaceable:
        kind = "a link" if target.is_symlink() else "a folder" if target.is_dir() else "a file"
        raise OutputError(f"{target} exists already and is {kind}; choose another output or remove it first.")
    if outside is None:
        return
    place, source = (Path(os.path.realpath(path)) for path in (target, outside))  # `resolve` fails in a circle of links
    if place.is_relative_to(source):
        raise OutputError(f"{target} lies inside the input {outside}; choose an output outside of it.")
    if occupied and source.is_relative_to(place):
        raise OutputError(f"{target} holds the input {outside}; replacing it would remove the input.")


def check_replaceable(output: Path, kind: str, mark: str, *, inputs: Iterable[Path], replace: bool) -> None:
    """Check that a new folder can be made at `output`, or that the one there is of the same kind and may be replaced.

    Args:
        output: Path of the new folder.
        kind: Kind of output in words, such as "folded adapter".
        mark: Name of a file that every output of this kind holds.
        inputs: Folders that the command reads, in which the output may not lie.
        replace: Whether to replace an output of this kind that exists.

    Raises:
        OutputError: The destination is not free, or holds something else.
    """
    target = output.absolute()
    for folder in inputs:
        check_free(target, outside=folder, replace=replace)
    if target.exists() and any(target.iterdir()) and not (target / mark).is_file():
        raise OutputError(
            f"{target} holds no {kind}, and {as_written('force')} replaces {kind}s only; choose another output."
        )


def _as_os_error(error: Exception) -> OSError | None:
    """Return the system's error behind an exception; libraries in Rust name it by its number in their text alone."""
    if isinstance(error, LoraOverError):
        return None
    if isinstance(error, OSError):
        return error
    numbers = map(int, re.findall(r"\(os error (\d+)\)", str(error)))
    number = next((n for n in numbers if n in UNWRITABLE), None)
    return None if number is None else OSError(number, os.strerror(number))


def unwritable(error: BaseException, target: Path) -> BaseException:
    """Return an OutputError for an exception that says that a disk is full or read-only; any other exception itself.

    The folder `target`, into which work such as training writes piece by piece, keeps what it holds.
    """
    failure = _as_os_error(error) if isinstance(error, Exception) else None
    if isinstance(error, RuntimeError) and "inline_container" in str(error):  # torch.save says only where it was cut
        failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if failure is None or failure.errno not in UNWRITABLE:
        return error
    return OutputError(f"cannot write {target}: {failure.strerror}. Free space, and continue with what is there.")


def _is_about(error: OSError, draft: Path) -> bool:
    """Whether an error names the draft, a folder above it, or no file at all, as the error of a full disk does."""
    if error.filename is None:
        return True
    named = Path(os.fsdecode(error.filename))
    return named.is_relative_to(draft) or draft.is_relative_to(named)


def _output_error(target: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"cannot write {target}: {reason}. Nothing was left there; free space or choose another output.")


def _file_mode(folder: Path) -> int:
    """Find the permissions of a new file by making one: reading the umask would change it, for other threads too."""
    probe = folder / f".{secrets.token_hex(4)}.mode"
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()


def sync(path: Path) -> None:
    """Wait until a file or folder has been written to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
