"""The cache of the hub's library with models in it, and no hub."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

HubCache = Callable[..., str]


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubCache:
    """Function that puts a folder into an empty cache, as a model of a name at a revision; returns its commit.

    The library reads HF_HUB_CACHE and HF_HUB_OFFLINE once, when it is imported, so its constants stand for them.
    """
    cache = tmp_path / "hub cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(name: str, revision: str, folder: Path) -> str:
        repository, commit = cache / f"models--{name.replace('/', '--')}", hashlib.sha1(revision.encode()).hexdigest()
        for part in ("refs", "snapshots"):
            (repository / part).mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        (repository / "snapshots" / commit).symlink_to(folder)
        return commit

    return put
