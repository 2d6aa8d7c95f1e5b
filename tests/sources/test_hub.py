"""Adapters by their name on the hub, from a server that answers as it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loraover.sources.hub import HubUnreachableError, fetch_repository

from support.hub_server import COMMIT, model_hub


@pytest.mark.process
def test_a_hub_name_is_pinned_and_found_again_without_the_hub(adapter: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()}
    code = "import sys; from loraover.sources.fetch import fetch_adapter as f; print(f(sys.argv[1], print).address)"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def fetch(name: str, **more: str) -> list[str]:
        words = [sys.executable, "-c", code, name]
        ran = subprocess.run(words, env={**environment, **more}, capture_output=True, text=True, check=False)
        return (ran.stdout or ran.stderr).splitlines()

    with model_hub("org/shop", files) as address:
        assert fetch("org/shop", HF_ENDPOINT=address)[-1] == f"org/shop@{COMMIT}"
        assert "the hub refuses it" in "".join(fetch("org/none", HF_ENDPOINT=address))
    assert fetch("org/shop", HF_HUB_OFFLINE="1")[-1] == f"org/shop@{COMMIT}"
    assert (
        "no such folder here, and model 'org/none': the hub cannot be reached"
        in (fetch("org/none", HF_HUB_OFFLINE="1")[-1])
    )


@pytest.mark.parametrize("kind", ["ProxyError", "ConnectError", "ReadTimeout"])
def test_a_hub_that_cannot_be_reached_is_said(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of the hub's HTTP library are not all OSErrors, and its client lets some of them through."""
    errors = pytest.importorskip("httpx2")

    def fail(*words: Any, **more: Any) -> None:
        raise getattr(errors, kind)("403 Forbidden")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(HubUnreachableError, match="cannot be reached and its cache holds no copy"):
        fetch_repository("org/shop", None, "model", ("config.json",))
