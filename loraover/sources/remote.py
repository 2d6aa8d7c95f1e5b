"""Folders that fsspec opens, such as s3://bucket/folder."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraover.common.extras import install
from loraover.sources.cache import Entry, SourceError, Store, are_wanted

if TYPE_CHECKING:
    from loraover.sources.address import Address

PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}
FOREIGN = {"botocore.exceptions": "BotoCoreError", "ftplib": "Error"}
"""Errors that derive from no built-in one, by their modules."""
VOLATILE = ("expires", "atime", "accessed")


class RemoteStore(Store):
    """A folder that fsspec opens, with the credentials of the environment.

    Args:
        address: The folder's address.

    Raises:
        SourceError: The scheme is unknown, or its package is missing.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        try:
            from fsspec.core import url_to_fs

            with self._errors():
                self._system, self._root = self._opened(url_to_fs)
        except ImportError as error:
            package = PACKAGES.get(address.scheme, "fsspec")
            raise SourceError(
                f"{address}: this needs {package}, which is not installed ({error}): "
                f"{install('remote') if package in ('s3fs', 'fsspec') else f'pip install {package}'}"
            ) from error

    def entries(self, wanted: tuple[str, ...]) -> Mapping[str, Entry]:
        with self._errors():
            self._system.invalidate_cache()
            root = f"{self._root}/"
            found = self._system.ls(root, detail=True)
        entries = {
            info["name"].removeprefix(root): Entry(int(info["size"] or 0), _mark(info))
            for info in found
            if info["type"] == "file" and info["name"] != root
        }
        return are_wanted(entries, wanted)

    def read(self, name: str, target: Path, size: int) -> None:
        with self._errors():
            self._system.get_file(f"{self._root}/{name}", str(target))

    def _opened(self, url_to_fs: Callable[[str], tuple[Any, str]]) -> tuple[Any, str]:
        """Return the system, at the host and the port that the address names, and the folder's path there."""
        try:
            system, root = url_to_fs(self._address.text)
        except TypeError as error:
            raise SourceError(
                f"{self._address}: lacks a part that {self._address.scheme}:// needs: {error}; write the address as "
                "fsspec takes it."
            ) from error
        return system, root.rstrip("/")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn the errors of fsspec and of its packages into ours."""
        others = tuple(vars(sys.modules[name])[kind] for name, kind in FOREIGN.items() if name in sys.modules)
        try:
            yield
        except FileNotFoundError as error:
            raise SourceError(f"{self._address}: no such folder there: {error}; check the address.") from error
        except PermissionError as error:
            raise SourceError(
                f"{self._address}: access is refused: {error}; give credentials as {self._address.scheme} takes them."
            ) from error
        except others as error:
            raise SourceError(f"{self._address}: cannot be read: {error}") from error
        except (OSError, ValueError) as error:
            if getattr(error, "errno", None) is not None and getattr(error, "filename", None) is not None:
                raise  # an error of this machine's disk, which the writer of the cache explains
            raise SourceError(f"{self._address}: cannot be read: {error}") from error


def _mark(info: Mapping[str, Any]) -> str:
    """Return a digest of what a system says of a file, such as its ETag and time of change."""
    facts = sorted((name, str(value)) for name, value in info.items() if name not in VOLATILE)
    return hashlib.sha256(repr(facts).encode()).hexdigest()
