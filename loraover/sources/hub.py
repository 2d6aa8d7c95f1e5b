"""Files and commits of repositories on the Hugging Face hub."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from loraover.sources.stores import SourceError

Kind = Literal["model", "dataset"]


class HubUnreachableError(SourceError):
    """The hub cannot be reached, and its cache holds nothing under the name."""


def pinned_commit(name: str, revision: str | None, kind: Kind) -> str:
    """Return the present commit of a repository's revision, or the cached one if the hub cannot be reached.

    Raises:
        ConfigError: As `fetch_repository` does.
    """
    return fetch_repository(name, revision, kind, ("config.json", "modules.json", "README.md")).name


def fetch_repository(name: str, revision: str | None, kind: Kind, wanted: Sequence[str]) -> Path:
    """Return the folder of the hub's cache with a repository's files; the folder's name is the commit.

    Args:
        name: Hub name of the repository.
        revision: Branch, tag or commit; None means "main".
        kind: Kind of repository.
        wanted: Names of files, or patterns of names.

    Raises:
        ConfigError: The repository or revision does not exist, or access is refused.
        HubUnreachableError: The hub cannot be reached, and its cache holds no copy.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=list(wanted)))
    except LocalEntryNotFoundError as error:  # before huggingface-hub 1, one of the HfHubHTTPErrors below
        raise _unreachable(kind, name) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise SourceError(f"{kind} {name!r} at revision {revision or 'main'}: the hub refuses it: {error}") from error
    except (OSError, *http_errors()) as error:
        raise _unreachable(kind, name) from error


def http_errors() -> list[Any]:
    """Return the errors of the library by which the hub is asked, some of which its client lets through.

    Versions 1 and 2 of huggingface-hub ask by these, and the errors of what version 0 asks by are OSErrors.
    """
    return [sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules]


def _unreachable(kind: str, name: str) -> HubUnreachableError:
    return HubUnreachableError(f"{kind} {name!r}: the hub cannot be reached and its cache holds no copy.")
