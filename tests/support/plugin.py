"""A real vLLM server with the plug-in, adapters of every kind in a folder, and requests to it."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from torch import Tensor

from loraover_serve.plugin.settings import ADAPTERS, CACHE
from loraover_serve.vllm.server import VllmServer, VllmServerConfig

from support.conversions import Source, make_source
from support.engine_forms import TINY
from support.make_checkpoint import edit_json, edit_tensors
from support.plain_adapter import tiny_decoder
from support.tiny_hub import tiny_tokenizer
from support.vllm_loading import serving_loader

ROOT = Path(__file__).parents[2]
MAX_RANK = 16
LORA = ("--enable-lora", "--max-loras", "2", "--max-lora-rank", str(MAX_RANK))
REQUEST_S = 300.0

SOURCES = {
    "plain": Source("LORA", {"r": 4, "lora_alpha": 6}),
    "rslora": Source("LORA", {"r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 6}}),
    "loha": Source("LOHA", {"r": 3, "alpha": 3}),
    "lokr": Source("LOKR", {"r": 3, "alpha": 3, "decompose_factor": 4}),
    "vera": Source("VERA", {"r": 16}),
    "pissa": Source("LORA", {"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa"}),
}
"""Kinds of adapters that PEFT makes."""

Change = Callable[[Path], object]


def narrow(folder: Path) -> None:
    """Give one A of a plain adapter another width, which vLLM takes without a message."""

    def change(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in tensors if key.endswith("q_proj.lora_A.weight"))
        tensors[key] = tensors[key][:, :48].contiguous()

    edit_tensors(folder / "adapter_model.safetensors", change)


def truncate(folder: Path) -> None:
    """Cut the file of a plain adapter's tensors."""
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def misplace(folder: Path) -> None:
    """Name the modules of a plain adapter as a multimodal model of its family does."""

    def change(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(".model.layers", ".model.language_model.layers")] = tensors.pop(key)

    edit_tensors(folder / "adapter_model.safetensors", change)


DAMAGED: dict[str, tuple[Change, str]] = {
    "dora": (lambda f: edit_json(f / "adapter_config.json", lambda c: c.update(use_dora=True)), "magnitude"),
    "truncated": (truncate, "not a complete safetensors file"),
    "narrow": (narrow, "other shapes"),
    "high": (lambda f: edit_json(f / "adapter_config.json", lambda c: c.update(r=5)), "rank"),
}
"""Changes of the plain adapter, each with a part of the reason for which it is refused."""


@dataclass(frozen=True)
class Plugged:
    """A running server, and its folders.

    Args:
        server: Client of the server.
        base: Folder of the base model.
        adapters: Folder of the adapters.
        cache: Folder of prepared adapters.
        log: File of the server's output.
    """

    server: VllmServer
    base: Path
    adapters: Path
    cache: Path
    log: Path

    def complete(self, name: str) -> httpx2.Response:
        """Ask an adapter for two tokens."""
        return self.post("/v1/completions", {"model": name, "prompt": "the train", "max_tokens": 2, "temperature": 0})

    def post(self, path: str, body: dict[str, Any] | None = None) -> httpx2.Response:
        return httpx2.post(f"{self.server.url}{path}", json=body or {}, timeout=REQUEST_S)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(f"{self.server.url}{path}", timeout=REQUEST_S)

    def worker(self) -> psutil.Process:
        """The process that prepares adapters."""
        children = psutil.Process(self.server.pid).children(recursive=True)
        (found,) = (child for child in children if "loraover_serve.plugin.worker" in child.cmdline())
        return found


def make_adapters(folder: Path) -> tuple[Path, Path]:
    """A base model, and a folder of adapters of each kind, right and damaged; returns both."""
    base = folder / "base"
    tiny_decoder("Llama", vocab_size=72).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    adapters = folder / "adapters"
    adapters.mkdir()
    for name, source in SOURCES.items():
        make_source(base, adapters / name, source)
    for name, (change, _) in DAMAGED.items():
        change(shutil.copytree(adapters / "plain", adapters / name))
    misplace(shutil.copytree(adapters / "plain", adapters / "misplaced"))
    make_source(base, folder / "elsewhere", SOURCES["plain"])
    (adapters / "link").symlink_to(folder / "elsewhere")
    return base, adapters


def with_entry_points(folder: Path) -> str:
    """A path for Python on which this package is installed, as far as entry points are concerned."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]
    info = folder / "loraover-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loraover\nVersion: 0\n")
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in points[group].items())
        for group in ("vllm.general_plugins", "vllm.endpoint_plugins")
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return os.pathsep.join(map(str, (folder, ROOT, ROOT / "export", ROOT / "serve")))


@contextmanager
def plugged(folder: Path, *options: str) -> Iterator[Plugged]:
    """Serve the adapters of `make_adapters` by the plug-in, in an empty folder."""
    base, adapters = make_adapters(folder)
    (folder / "installed").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", with_entry_points(folder / "installed"))
        patch.setenv("VLLM_PLUGINS", "loraover")
        patch.setenv(ADAPTERS, str(adapters))
        patch.setenv(CACHE, str(folder / "cache"))
        config = VllmServerConfig(str(base), options=(*LORA, *TINY, *options))
        with serving_loader(config, folder / "vllm.log") as server:
            yield Plugged(server, base, adapters, folder / "cache", folder / "vllm.log")


def reason(answer: httpx2.Response) -> str:
    """The message of an answer that refuses."""
    return str(json.loads(answer.text)["error"]["message"])
