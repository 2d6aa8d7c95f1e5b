"""Output that is whole or absent: written beside its destination, synced, renamed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from loraover.errors import OutputError


@contextmanager
def publish_directory(destination: str | os.PathLike[str], *, outside: Path | None = None) -> Iterator[Path]:
    """A new folder to fill, which becomes `destination` when the block ends without an exception.

    Args:
        destination: must not exist; missing parents are made.
        outside: a folder that the destination may not lie in, such as the command's input.
    Yields:
        A temporary folder beside the destination, removed if the block raises.
    Raises:
        OutputError: the destination exists, lies in `outside`, or cannot be written (no permission,
            no space).
    """
    target = Path(destination).absolute()
    check_free(target, outside=outside)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    except OSError as error:
        raise _output_error(target, error) from error
    try:
        yield draft
        for path in sorted(draft.rglob("*")):
            if path.is_file():
                sync(path)
        sync(draft)
        check_free(target)
        draft.chmod(0o777 & ~_umask())
        draft.rename(target)
        sync(target.parent)
    except OSError as error:
        if isinstance(error, OutputError) or error.errno not in _WRITE_ERRORS:
            raise
        raise _output_error(target, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


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
        raise _output_error(target, error) from error
    finally:
        draft.unlink(missing_ok=True)


def check_free(target: Path, *, outside: Path | None = None) -> None:
    """Raise OutputError unless `target` can become a new folder."""
    if target.exists() or target.is_symlink():
        kind = "a folder" if target.is_dir() else "a file"
        raise OutputError(f"{target} exists already and is {kind}; choose another output or remove it first.")
    if outside is not None and target.resolve().is_relative_to(outside.resolve()):
        raise OutputError(f"{target} lies inside the input {outside}; choose an output outside of it.")


_WRITE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EFBIG,
    errno.EIO,
}


def _output_error(target: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(f"cannot write {target}: {reason}. Nothing was left there; free space or choose another output.")


def sync(path: Path) -> None:
    """Put a file or folder on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
