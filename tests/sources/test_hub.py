"""Adapters by their name on the hub, from a server that answers as it does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.http_server import Handler, serving
from support.hub_server import COMMIT, model_hub

pytestmark = pytest.mark.process


CODE = """
import sys
from loraover.sources.fetch import fetch_adapter
print(fetch_adapter(sys.argv[1], print).address)
"""


def fetch(home: Path, name: str, **variables: str) -> str:
    """Fetch an adapter in a process with a cache of the hub's; returns its output or its error."""
    own = {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    words = [sys.executable, "-c", CODE, name]
    ran = subprocess.run(words, env={**os.environ, **own, **variables}, capture_output=True, text=True, check=False)
    return ran.stdout or ran.stderr


def test_a_hub_name_is_pinned_and_found_again_without_the_hub(adapter: Path, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()}
    with model_hub("org/shop", files) as address:
        assert fetch(tmp_path, "org/shop", HF_ENDPOINT=address).endswith(f"org/shop@{COMMIT}\n")
        assert "the hub refuses it" in fetch(tmp_path, "org/none", HF_ENDPOINT=address)
    assert fetch(tmp_path, "org/shop", HF_HUB_OFFLINE="1").endswith(f"org/shop@{COMMIT}\n")
    message = "no such folder here, and model 'org/none': the hub cannot be reached and its cache holds no copy"
    assert message in fetch(tmp_path, "org/none", HF_HUB_OFFLINE="1")


class Wall(Handler):
    """A proxy that lets nobody out, and a hub that hangs up."""

    def do_CONNECT(self) -> None:
        self.answer(403, b"")

    def do_GET(self) -> None:
        self.close_connection = True


@pytest.mark.parametrize("kind", ["ProxyError", "ConnectError", "RemoteProtocolError"])
def test_a_hub_that_cannot_be_reached_is_said(kind: str, tmp_path: Path) -> None:
    """Errors of the hub's HTTP library are not all OSErrors, and its client lets some of them through."""
    with serving(Wall) as wall:
        variables = {
            "ProxyError": {"HF_ENDPOINT": "https://huggingface.co", "HTTPS_PROXY": wall, "https_proxy": wall},
            "ConnectError": {"HF_ENDPOINT": "http://127.0.0.1:1"},
            "RemoteProtocolError": {"HF_ENDPOINT": wall},
        }
        message = "model 'org/shop': the hub cannot be reached and its cache holds no copy"
        assert message in fetch(tmp_path, "org/shop", **variables[kind])
