"""Look-up of commits on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from loraover.common.errors import ConfigError


class HubUnreachableError(ConfigError):
    """The hub cannot be reached, and its cache holds nothing under the name."""


def pinned_commit(name: str, revision: str | None, kind: Literal["model", "dataset"]) -> str:
    """Return the present commit of a repository's revision, or the cached one if the hub cannot be reached.

    Args:
        name: Hub name of the repository.
        revision: Branch, tag or commit; None means "main".
        kind: Kind of repository.

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

    patterns = ["config.json", "README.md"]
    try:
        folder = snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns)
    except LocalEntryNotFoundError as error:  # before huggingface-hub 1, one of the HfHubHTTPErrors below
        raise _unreachable(kind, name) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise ConfigError(f"{kind} {name!r} at revision {revision or 'main'}: the hub refuses it: {error}") from error
    except OSError as error:
        raise _unreachable(kind, name) from error
    return Path(folder).name


def _unreachable(kind: str, name: str) -> HubUnreachableError:
    return HubUnreachableError(f"{kind} {name!r}: the hub cannot be reached and its cache holds no copy.")
