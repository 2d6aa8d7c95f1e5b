"""Repositories on the Hugging Face hub: what is read from them, and folders that are uploaded to them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from loraover.common.errors import ConfigError, OutputError
from loraover.common.request import as_written, option
from loraover.sources.address import SourceError

Kind = Literal["model", "dataset"]

PUSH = "push_to_hub"
"""Name of the field that holds the repository, in the requests and in a recipe."""
LEFT_OUT = ("*.html", "figures/*")
"""Patterns of files that stay here: pages repeat what the certificates have, with paths of this machine."""


class HubUnreachableError(SourceError):
    """The hub cannot be reached, and its cache holds nothing under the name."""


def pinned_commit(name: str, revision: str | None, kind: Kind) -> str:
    """Return the present commit of a repository's revision, or the cached one if the hub cannot be reached."""
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


def pushes(product: str) -> Any:
    """Declare the field `push_to_hub`, the repository to which a verb uploads its product."""
    return option(
        f"Repository on the hub to upload {product} to, with model card, certificate and reference.",
        default=None,
        metavar="OWNER/NAME",
    )


def keeps_private(needs: str | None = PUSH) -> Any:
    """Declare the field `private` of a verb with the field `push_to_hub`."""
    return option("Make the repository private if the upload creates it.", default=False, needs=needs)


def check_repository(repository: str) -> None:
    """Check before any work whether a product could be uploaded to a repository.

    Raises:
        ConfigError: A name that no repository can have, or nobody is logged in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"{as_written(PUSH)}: {str(error).rstrip('.')}.") from error
    if get_token() is None:
        raise ConfigError(
            f"{as_written(PUSH)}: nobody is logged in to the hub here. Log in with hf auth login, or set HF_TOKEN."
        )


def push(
    repository: str, folder: Path, kept: Path, place: str | None = None, *, is_private: bool | None = None
) -> None:
    """Upload a folder, without its pages.

    Args:
        repository: Name on the hub; it is made if it is missing.
        folder: Folder to upload.
        kept: Folder on this machine that keeps the same files, for messages.
        place: Folder of the repository; None: its root.
        is_private: Whether a repository that is made is private; None: as the hub does for its owner.

    Raises:
        OutputError: The hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=is_private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, path_in_repo=place, ignore_patterns=list(LEFT_OUT))
    except Exception as error:  # the hub's client lets its HTTP library's own errors through
        raise OutputError(f"{as_written(PUSH)}: {repository}: {error}. What was made is safe in {kept}.") from error


def push_checked(request: Any, verdict: str) -> None:
    """Upload what an export has written, if all of its checks passed.

    Args:
        request: The export's request, with `push_to_hub`, `private`, `output` and `report`.
        verdict: Verdict of the checks.

    Raises:
        OutputError: As `push` does.
    """
    repository = request.push_to_hub
    if verdict == "passed":
        push(repository, request.output, request.output, is_private=request.private or None)
        request.report.line(f"uploaded to {repository}")
    elif verdict != "failed":  # of what failed, nothing is written either
        request.report.line(f"not uploaded to {repository}, since the check is {verdict}")
