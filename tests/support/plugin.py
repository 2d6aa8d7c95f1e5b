"""A real vLLM server with the plug-in, adapters of every kind in a folder, and requests to it."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from loraover import LoraOverConfig, OverParameterization, write_checkpoint
from loraover_serve import serve_adapters
from loraover_serve.plugin.settings import DEFAULT_SETTLE_S
from loraover_serve.vllm.client import VllmServer
from loraover_serve.vllm.request import LOOPBACK
from loraover_serve.vllm.server import free_port

from support.conversions import Source, make_source
from support.engine_forms import TINY
from support.make_checkpoint import edit_json, edit_tensors
from support.plain_adapter import tiny_decoder
from support.tiny_hub import tiny_tokenizer
from support.tiny_models import fill_b
from support.vllm_command import vllm_command

ROOT = Path(__file__).parents[2]
MAX_RANK = 16
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

UNLIKE = {
    "lokr-64": (Source("LOKR", {"r": 8, "alpha": 8, "decompose_factor": 8}), "--max-lora-rank 64"),
    "dora": (Source("LORA", {"r": 3, "use_dora": True}), "full rank"),
}
"""Kinds that have no exact LoRA of the server's rank, each with a part of the reason."""

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

    def listed(self, name: str) -> dict[str, Any]:
        """What the server's list says of an adapter."""
        adapters: list[dict[str, Any]] = self.get("/v1/adapters").json()["adapters"]
        return next(each for each in adapters if each["name"] == name)

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
    for name, (source, _) in UNLIKE.items():
        make_source(base, adapters / name, source)
    make_checkpoint_on(base, adapters / "checkpoint")
    for name, (change, _) in DAMAGED.items():
        change(shutil.copytree(adapters / "plain", adapters / name))
    misplace(shutil.copytree(adapters / "plain", adapters / "misplaced"))
    shutil.copytree(adapters / "plain", adapters / "first")
    make_source(base, folder / "elsewhere", SOURCES["plain"])
    (adapters / "link").symlink_to(folder / "elsewhere")
    return base, adapters


def make_checkpoint_on(base: Path, folder: Path) -> None:
    """A LoRA-Over checkpoint whose B is not zero."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    fill_b(model, seed=2)
    model.save_pretrained(folder)
    write_checkpoint(folder, OverParameterization(model, LoraOverConfig(seed=5)), step=0)


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
    return os.pathsep.join(map(str, (folder, ROOT, ROOT / "export", ROOT / "serve", ROOT / "lab")))


@contextmanager
def plugged(
    folder: Path,
    made: tuple[Path, Path],
    cache: Path,
    *options: str,
    max_rank: int = MAX_RANK,
    settle_s: float = DEFAULT_SETTLE_S,
) -> Iterator[Plugged]:
    """Serve adapters by the plug-in.

    Args:
        folder: A new folder for the server's files.
        made: The base model and the folder of adapters, from `make_adapters`.
        cache: Folder of prepared adapters.
        options: Further options of `vllm serve`, of which vLLM takes the last.
        max_rank: Largest rank that the server takes.
        settle_s: Seconds for which an adapter's files have to be unchanged before they are read.
    """
    base, adapters = made
    (folder / "installed").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as until:
        patch.setenv("PYTHONPATH", with_entry_points(folder / "installed"))
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("LORAOVER_PREPARE", "first, absent")
        server = until.enter_context(
            serve_adapters(
                folder=adapters,
                model=base,
                max_lora_rank=max_rank,
                cache=cache,
                settle_s=settle_s,
                vllm=vllm_command(),
                port=free_port(LOOPBACK),
                log=folder / "vllm.log",
                options=("--max-loras", "2", *TINY, *options),
            )
        )
        yield Plugged(server, base, adapters, cache, folder / "vllm.log")


def reason(answer: httpx2.Response) -> str:
    """The message of an answer that refuses."""
    return str(json.loads(answer.text)["error"]["message"])
