"""A server with as much of the hub's API as an upload needs, which `huggingface_hub` talks to through HF_ENDPOINT."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from support.openai_server import POLL_S

TOKEN = "hf_stand_in"
LARGE = (".safetensors", ".gz", ".json")
"""Endings of the files that the stand-in wants by git LFS, as the hub does with weights; others come in the commit."""


@dataclass
class HubServer:
    """One running stand-in.

    Args:
        url: Its address, for HF_ENDPOINT.
        repositories: Files of each repository that was made, by path.
        commits: Paths of each commit.
    """

    url: str
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a process that uploads here, by LFS in place of Xet's own servers."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def write(self, repository: str, folder: Path) -> Path:
        """Write a repository's files to a folder."""
        for name, content in self.repositories[repository].items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return folder


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Run a stand-in for the block. It refuses requests without its token, and repositories of others than "me"."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = HubServer(f"http://127.0.0.1:{server.server_port}")
    _Handler.hub, _Handler.objects = hub, {}
    thread = threading.Thread(target=server.serve_forever, args=(POLL_S,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    objects: dict[str, bytes]
    """Contents that came by LFS, by SHA-256."""

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        owner, name, action, _ = path.removeprefix("/api/models/").split("/")
        files = self.hub.repositories.get(f"{owner}/{name}")
        if files is None:
            return self._answer(404, {"error": "Repository not found"})
        if action == "preupload":
            asked = [one["path"] for one in json.loads(body)["files"]]
            modes = [
                {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}
                for path in asked
            ]
            return self._answer(200, {"files": modes})
        return self._commit(f"{owner}/{name}", files, body)

    def do_PUT(self) -> None:
        content, oid = self._body(), self.path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != oid:
            return self._answer(400, {"error": "the digest does not fit"})
        self.objects[oid] = content
        return self._answer(200, {})

    def _create(self, asked: dict[str, Any]) -> None:
        if asked["organization"] != "me":
            return self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        repository = f"me/{asked['name']}"
        if repository in self.hub.repositories:
            there = {"error": "You already created this model repo", "url": f"{self.hub.url}/{repository}"}
            return self._answer(409, there)
        self.hub.repositories[repository] = {}
        return self._answer(200, {"url": f"{self.hub.url}/{repository}"})

    def _batch(self, asked: dict[str, Any]) -> None:
        upload = [
            one | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}} for one in asked["objects"]
        ]
        self._answer(200, {"transfer": "basic", "objects": upload})

    def _commit(self, repository: str, files: dict[str, bytes], body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        added = {one["value"]["path"]: one["value"] for one in lines if one["key"] in ("file", "lfsFile")}
        for path, value in added.items():
            files[path] = self.objects[value["oid"]] if "oid" in value else base64.b64decode(value["content"])
        self.hub.commits.append(sorted(added))
        oid = hashlib.sha1(body).hexdigest()
        url = f"{self.hub.url}/{repository}/commit/{oid}"
        self._answer(200, {"commitOid": oid, "commitUrl": url, "pullRequestUrl": None})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        sent = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *_: object) -> None:
        """Keep quiet."""
