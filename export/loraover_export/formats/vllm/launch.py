"""The commands that serve a written adapter."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from loraover.adapters.uniform.rank_limits import max_lora_rank
from loraover_export.formats.vllm.candidate import Candidate

LOAD_URL = "http://localhost:8000/v1/load_lora_adapter"


def lora_module(name: str, path: Path) -> str:
    """Return a value of --lora-modules: name=path, or JSON where a character in them would be misread."""
    text = f"{name}={path}"
    if "," in text or "=" in name or name.startswith(("-", "{")):
        return json.dumps({"name": name, "path": str(path)})
    return text


def launch_commands(candidate: Candidate, path: Path) -> dict[str, str]:
    """Return two commands, quoted for a POSIX shell: `serve` starts vLLM, `load` adds to a running server.

    The server that `load` asks must have been started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1.

    Args:
        candidate: The adapter and the served model.
        path: Absolute path of the written adapter, so that the commands work in any folder.
    """
    revision, rank = candidate.served.source.revision, max_lora_rank(candidate.adapter.rank)
    pinned = [] if revision is None else ["--revision", revision]
    serve = ["vllm", "serve", candidate.address, *pinned, "--enable-lora", "--max-lora-rank", str(rank)]
    body = json.dumps({"lora_name": candidate.name, "lora_path": str(path)})
    load = ["curl", LOAD_URL, "-H", "Content-Type: application/json", "-d", body]
    return {
        "serve": shlex.join([*serve, "--lora-modules", lora_module(candidate.name, path)]),
        "load": shlex.join(load),
    }
