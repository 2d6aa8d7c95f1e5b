"""Servers with as much of the hub's API as uploads and downloads need, for `huggingface_hub` through HF_ENDPOINT."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.http_server import Handler, serving

TOKEN = "hf_stand_in"
LARGE = (".safetensors", ".gz", ".json")
"""Endings of the files that the stand-in wants by git LFS, as the hub does with weights; others come in the commit."""


@dataclass
class HubServer:
    """One running stand-in."""

    url: str
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: list[list[str]] = field(default_factory=list)
    private: set[str] = field(default_factory=set)

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
    with serving(_Uploads) as url:
        _Uploads.hub, _Uploads.objects = HubServer(url), {}
        yield _Uploads.hub


class _Uploads(Handler):
    hub: HubServer
    objects: dict[str, bytes]
    """Contents that came by LFS, by SHA-256."""

    def do_POST(self) -> None:
        body = self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._say(401, {"error": "Invalid username or password."})
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._say(200, {"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        owner, name, action, _ = path.removeprefix("/api/models/").split("/")
        files = self.hub.repositories.get(f"{owner}/{name}")
        if files is None:
            return self._say(404, {"error": "Repository not found"})
        if action == "preupload":
            asked = [one["path"] for one in json.loads(body)["files"]]
            modes = [
                {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}
                for path in asked
            ]
            return self._say(200, {"files": modes})
        return self._commit(f"{owner}/{name}", files, body)

    def do_PUT(self) -> None:
        content, oid = self.body(), self.path.rpartition("/")[2]
        if hashlib.sha256(content).hexdigest() != oid:
            return self._say(400, {"error": "the digest does not fit"})
        self.objects[oid] = content
        return self._say(200, {})

    def _create(self, asked: dict[str, Any]) -> None:
        if asked["organization"] != "me":
            return self._say(403, {"error": "You don't have the rights to create a model under this namespace"})
        repository = f"me/{asked['name']}"
        if repository in self.hub.repositories:
            there = {"error": "You already created this model repo", "url": f"{self.hub.url}/{repository}"}
            return self._say(409, there)
        self.hub.repositories[repository] = {}
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repository)
        return self._say(200, {"url": f"{self.hub.url}/{repository}"})

    def _batch(self, asked: dict[str, Any]) -> None:
        upload = [
            one | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}} for one in asked["objects"]
        ]
        self._say(200, {"transfer": "basic", "objects": upload})

    def _commit(self, repository: str, files: dict[str, bytes], body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        added = {one["value"]["path"]: one["value"] for one in lines if one["key"] in ("file", "lfsFile")}
        for path, value in added.items():
            files[path] = self.objects[value["oid"]] if "oid" in value else base64.b64decode(value["content"])
        self.hub.commits.append(sorted(added))
        oid = hashlib.sha1(body).hexdigest()
        url = f"{self.hub.url}/{repository}/commit/{oid}"
        self._say(200, {"commitOid": oid, "commitUrl": url, "pullRequestUrl": None})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return super().body()
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _say(self, status: int, content: dict[str, Any]) -> None:
        self.answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def model_hub(repository: str, files: Mapping[str, bytes], *, gives_weights: bool = True) -> Iterator[str]:
    """Run a hub with one model during a block; yields its address.

    Args:
        repository: Name of the model.
        files: Contents of its files at `COMMIT`.
        gives_weights: Whether files of weights are sent whole, or only as many of their first bytes as are asked for.
    """
    known = [(name, len(content), hashlib.sha1(content).hexdigest()) for name, content in files.items()]
    tree = [{"type": "file", "path": name, "size": size, "oid": oid} for name, size, oid in known]
    model = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}

    class Downloads(Handler):
        def do_GET(self) -> None:
            path, wanted = self.path.partition("?")[0], self.headers.get("Range")
            name, is_file = path.rpartition("/")[2], path.startswith(f"/{repository}/resolve/")
            if path.startswith(f"/api/models/{repository}"):
                self.answer(200, json.dumps(tree if "/tree/" in path else model).encode())
            elif not is_file or name not in files:
                self.answer(404, b"", {"X-Error-Code": "EntryNotFound" if is_file else "RepoNotFound"})
            elif self.command == "GET" and wanted is None and name.endswith(".safetensors") and not gives_weights:
                self.answer(403, b"")
            else:
                end = None if wanted is None else int(wanted.rpartition("-")[2]) + 1
                tag = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(files[name]).hexdigest()}"'}
                self.answer(200 if end is None else 206, files[name][:end], tag)

        def do_HEAD(self) -> None:
            self.do_GET()

    with serving(Downloads) as url:
        yield url
