"""Adapters by their name on the hub, from a server that answers as it does."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sources.test_sources import serving

from loraover.sources.hub import HubUnreachableError, fetch_repository

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The routes of the hub that a download takes, for one repository at one commit."""

    files: dict[str, bytes] = {}  # noqa: RUF012  a test sets it

    def log_message(self, *words: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if path.startswith("/api/models/org/shop/tree/"):
            body = json.dumps(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in self.files.items()
                ]
            ).encode()
        elif path.startswith("/api/models/org/shop"):
            siblings = [{"rfilename": name} for name in self.files]
            body = json.dumps({"id": "org/shop", "sha": COMMIT, "siblings": siblings}).encode()
        elif path.startswith("/org/shop/resolve/") and name in self.files:
            body = self.files[name]
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.mark.process
def test_a_hub_name_is_pinned_and_found_again_without_the_hub(adapter: Path, tmp_path: Path) -> None:
    Hub.files = {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()}
    code = "import sys; from loraover.sources.fetch import fetch_adapter as f; print(f(sys.argv[1], print).address)"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def fetch(name: str, **more: str) -> list[str]:
        words = [sys.executable, "-c", code, name]
        ran = subprocess.run(words, env={**environment, **more}, capture_output=True, text=True, check=False)
        return (ran.stdout or ran.stderr).splitlines()

    with serving(Hub) as address:
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
