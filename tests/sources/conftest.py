"""A cache of its own for each test of sources, and an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraover.common.paths import cache_folder

from support.plain_adapter import make_adapter


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder() / "sources"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("llama"), "Llama")
