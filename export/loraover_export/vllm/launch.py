"""The commands that serve a written adapter."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank: vllm/config/lora.py of vLLM 0.32."""


def max_lora_rank(r: int) -> int | None:
    """The smallest allowed --max-lora-rank for adapters of rank r; None where there is none.

    Larger than needed costs time and memory: vLLM pads every adapter to it.
    """
    return next((allowed for allowed in MAX_LORA_RANKS if allowed >= r), None)


def lora_module(name: str, path: Path) -> str:
    """One value of --lora-modules: name=path, or JSON where a sign in them would be misread."""
    text = f"{name}={path}"
    if "," in text or "=" in name or name.startswith(("-", "{")):
        return json.dumps({"name": name, "path": str(path)})
    return text


def serve_command(model: str, revision: str | None, rank: int, name: str, path: Path) -> str:
    """The line that starts vLLM with the adapter, quoted for a POSIX shell.

    Args:
        model: hub name, or folder.
        rank: of --max-lora-rank.
        path: absolute, so that the line works anywhere on the machine.
    """
    pinned = [] if revision is None else ["--revision", revision]
    words = ["vllm", "serve", model, *pinned, "--enable-lora", "--max-lora-rank", str(rank)]
    return shlex.join([*words, "--lora-modules", lora_module(name, path)])


def load_command(name: str, path: Path) -> str:
    """The request that loads the adapter into a running server, which must have been started with
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1; quoted for a POSIX shell."""
    body = json.dumps({"lora_name": name, "lora_path": str(path)})
    words = ["curl", "http://localhost:8000/v1/load_lora_adapter", "-H", "Content-Type: application/json", "-d", body]
    return shlex.join(words)
