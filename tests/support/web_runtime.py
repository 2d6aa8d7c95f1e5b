"""onnxruntime-web in node and in headless Chromium, with the JavaScript of docs/examples/web."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest
import torch
from torch import Tensor

from support.chromium import FLAGS
from support.http_server import serving
from support.onnx_graph import Feed

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "web"
RUNNERS = Path(__file__).with_name("web")
TIMEOUT_S = 300


def command(name: str) -> str:
    """Path of a command; the test is skipped where it is missing."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no command {name} on PATH")
    return found


@contextmanager
def web_scripts(root: Path) -> Iterator[Path]:
    """The example's scripts in `root`/js, with the packages that its package.json names, which are removed again."""
    npm, folder = command("npm"), root / "js"
    command("node")
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("node_modules", "package-lock.json"))
    shutil.copytree(RUNNERS, folder, dirs_exist_ok=True)
    words = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock", "--prefer-offline"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode != 0:
        pytest.skip(f"npm cannot install onnxruntime-web: {done.stderr.strip()[:500]}")
    try:
        yield folder
    finally:
        shutil.rmtree(folder / "node_modules")


@dataclass(frozen=True)
class WebRun:
    """Batches of tokens through one graph in one session, with one adapter after another.

    Args:
        folder: Folder of the export, relative to the root.
        adapters: Adapters' files, relative to the root; None runs the base model.
        head_size: Size of the heads in the cache; None for a graph without a cache.
    """

    folder: str
    feeds: Sequence[Feed]
    adapters: Sequence[str | None]
    head_size: int | None = 32
    graph: str = "model.onnx"

    def request(self) -> dict[str, Any]:
        """What `logits` in logits.js takes."""
        return {
            "folder": self.folder,
            "graph": self.graph,
            "head_size": self.head_size,
            "batches": [{"rows": feed.rows, "steps": _steps(feed)} for feed in self.feeds],
            "adapters": list(self.adapters),
        }

    def logits(self, result: Any) -> list[list[Tensor]]:
        """Logits of the real tokens, of each batch with each adapter."""
        return [[_real(feed, steps) for steps in runs] for feed, runs in zip(self.feeds, result, strict=True)]


def _steps(feed: Feed) -> list[dict[str, Any]]:
    steps, start = [], 0
    for tokens in feed.steps:
        end = start + tokens
        feeds = {
            "input_ids": feed.ids[:, start:end],
            "attention_mask": feed.mask[:, :end],
            "position_ids": feed.positions[:, start:end],
            "token_type_ids": torch.zeros_like(feed.ids[:, start:end]),
        }
        steps.append({name: {"dims": list(t.shape), "data": t.flatten().tolist()} for name, t in feeds.items()})
        start = end
    return steps


def _real(feed: Feed, steps: Any) -> Tensor:
    logits = [torch.tensor(step["data"]).reshape(step["dims"]) for step in steps]
    return logits[0] if logits[0].ndim == 2 else feed.real(torch.cat(logits, dim=1))


def in_node(scripts: Path, run: WebRun) -> list[list[Tensor]]:
    """Logits from node."""
    return run.logits(ask_node(scripts, "logits", run.request()))


def ask_node(scripts: Path, function: str, request: dict[str, Any]) -> Any:
    """What a function of logits.js returns in node."""
    root = scripts.parent
    asked, result = root / "request.json", root / "result.json"
    asked.write_text(json.dumps(request))
    words = [command("node"), "in_node.js", function, str(root), str(asked), str(result)]
    subprocess.run(words, cwd=scripts, timeout=TIMEOUT_S, check=True)
    return json.loads(result.read_text())


def in_chromium(scripts: Path, run: WebRun) -> list[list[Tensor]]:
    """Logits from headless Chromium."""
    return run.logits(ask_chromium(scripts, "in_browser.html", run.request()))


def ask_chromium(scripts: Path, page: str, request: Any) -> list[Any]:
    """What a page posts, in headless Chromium, to the server on this machine from which it gets its files."""
    chromium, root = command("chromium"), scripts.parent
    (root / "request.json").write_text(json.dumps(request))
    with _server(root) as (address, results), tempfile.TemporaryDirectory() as profile:
        words = [chromium, *FLAGS, f"--user-data-dir={profile}", "--remote-debugging-port=0"]
        process = subprocess.Popen([*words, f"{address}/js/{page}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            found = json.loads(results.get(timeout=TIMEOUT_S))
        except Empty:
            pytest.fail("Chromium posted no result")
        finally:
            process.terminate()
            process.communicate()
    assert isinstance(found, list), found
    return found


@contextmanager
def _server(root: Path) -> Iterator[tuple[str, Queue[bytes]]]:
    """A server of the folder, its address, and the bodies that are posted to it."""
    results: Queue[bytes] = Queue()

    class Handler(SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            results.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with serving(partial(Handler, directory=str(root))) as address:
        yield address, results


ENGINES: dict[str, Callable[[Path, WebRun], list[list[Tensor]]]] = {"node": in_node, "Chromium": in_chromium}
