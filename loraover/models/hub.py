"""What this project asks of the Hugging Face hub: the commit behind a name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from loraover.common.errors import ConfigError


class HubUnreachableError(ConfigError):
    """The hub does not answer and its cache holds nothing of that name."""


def pinned_commit(name: str, revision: str | None, kind: Literal["model", "dataset"]) -> str:
    """The commit that a repository's revision stands for now, or in the cache when the hub is out of reach.

    Raises:
        ConfigError: no such repository or revision, or no access to it.
        HubUnreachableError: neither the hub nor its cache answers.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    patterns = ["config.json", "README.md"]
    try:
        folder = snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=patterns)
    except (RepositoryNotFoundError, RevisionNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise ConfigError(f"{kind} {name!r} at revision {revision or 'main'}: the hub refuses it: {error}") from error
    except OSError as error:
        raise HubUnreachableError(f"{kind} {name!r}: the hub cannot be reached and its cache holds no copy.") from error
    return Path(folder).name
