"""Output that is whole or absent: written beside its destination, synced, renamed."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loraover.errors import LoraOverError, OutputError

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def publish_directory(
    destination: str | os.PathLike[str], *, outside: Path | None = None, replace: bool = False
) -> Iterator[Path]:
    """A new folder to fill, which becomes `destination` when the block ends without an exception.

    Args:
        destination: must not exist; missing parents are made.
        outside: a folder that the destination may not lie in, such as the command's input.
        replace: a folder that exists is moved aside at the end, and removed once the new one is in its place;
            a kill between the two renames leaves it beside the destination, hidden, with the ending `.old`.
    Yields:
        A temporary folder beside the destination, removed if the block raises.
    Raises:
        OutputError: the destination exists, lies in `outside`, or cannot be written (no permission,
            no space); with `replace`: it is no folder, or `outside` lies in it.
    """
    target = Path(destination).absolute()
    check_free(target, outside=outside, replace=replace)
    draft = target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.tmp")
    made = [parent for parent in target.parents if not parent.exists()]
    published = False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir()
        yield draft
        for path in sorted(draft.rglob("*")):
            if path.is_file():
                path.chmod(0o666 & ~_umask())  # some libraries keep their files to themselves, servers run as others
            sync(path)
        sync(draft)
        _put_in_place(draft, target, replace)
        published = True
        for folder in (target.parent, *(parent.parent for parent in made)):
            sync(folder)
    except Exception as error:
        failure = _as_os_error(error)
        if failure is None or not _is_about(failure, draft):
            raise
        raise _output_error(target, failure) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        for parent in () if published else made:
            with suppress(OSError):
                parent.rmdir()


class _AbandonedError(Exception):
    """Leaves the block that would publish."""


def check_writable(destination: str | os.PathLike[str], *, outside: Path | None = None) -> None:
    """Raise OutputError unless `publish_directory` can begin there; nothing is left behind."""
    with suppress(_AbandonedError), publish_directory(destination, outside=outside):
        raise _AbandonedError


def _put_in_place(draft: Path, target: Path, replace: bool) -> None:
    check_free(target, replace=replace)
    if not target.exists():
        draft.rename(target)
        return
    aside = draft.with_suffix(".old")
    target.rename(aside)
    try:
        draft.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def publish_file(path: str | os.PathLike[str], fill: Callable[[Path], object]) -> None:
    """Replace one file, whole or not at all.

    Args:
        path: the file.
        fill: writes the new content to the temporary path that it is given.
    Raises:
        OutputError: it cannot be written.
    """
    target = Path(path).absolute()
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        fill(draft)
        sync(draft)
        draft.replace(target)
        sync(target.parent)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise _output_error(target, error) from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def publish_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace one file, in UTF-8; raises as `publish_file`."""
    publish_file(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def check_file_writable(path: str | os.PathLike[str]) -> None:
    """Raise OutputError unless `publish_file` can begin there; nothing is left behind."""

    def begin(draft: Path) -> None:
        draft.touch()
        raise _AbandonedError

    with suppress(_AbandonedError):
        publish_file(path, begin)


def check_free(target: Path, *, outside: Path | None = None, replace: bool = False) -> None:
    """Raise OutputError unless `target` can become a new folder, or with `replace` take the place of one."""
    try:
        occupied = target.exists() or target.is_symlink()
    except OSError as error:
        raise _output_error(target, error) from error
    replaceable = replace and target.is_dir() and not target.is_symlink()
    if occupied and not replaceable:
        kind = "a link" if target.is_symlink() else "a folder" if target.is_dir() else "a file"
        raise OutputError(f"{target} exists already and is {kind}; choose another output or remove it first.")
    if outside is not None and target.resolve().is_relative_to(outside.resolve()):
        raise OutputError(f"{target} lies inside the input {outside}; choose an output outside of it.")
    if outside is not None and occupied and outside.resolve().is_relative_to(target.resolve()):
        raise OutputError(f"{target} holds the input {outside}; replacing it would remove the input.")


def _as_os_error(error: Exception) -> OSError | None:
    """What the system refused, if that is what an error is about and it is not one of ours.

    Libraries in Rust (safetensors, tokenizers) put its number into the text of errors of their own.
    """
    if isinstance(error, LoraOverError):
        return None
    if isinstance(error, OSError):
        return error
    numbers = map(int, re.findall(r"\(os error (\d+)\)", str(error)))
    number = next((n for n in numbers if n in UNWRITABLE), None)
    return None if number is None else OSError(number, os.strerror(number))


def _is_about(error: OSError, draft: Path) -> bool:
    """Whether an error names the folder being filled, one above it, or no file at all, as a full disk does."""
    if error.filename is None:
        return True
    named = Path(os.fsdecode(error.filename))
    return named.is_relative_to(draft) or draft.is_relative_to(named)


def _output_error(target: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"cannot write {target}: {reason}. Nothing was left there; free space or choose another output.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Put a file or folder on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
