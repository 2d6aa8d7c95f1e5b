"""Serve exported adapters with vLLM until someone stops it."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from loraover.adapter_dir import AdapterDir, read_adapter_dir
from loraover.errors import ConfigError, EngineError
from loraover.models import resolve_model
from loraover_export.vllm.launch import max_lora_rank
from loraover_export.vllm.uniform import largest_rank
from loraover_serve.vllm_client import VllmClient
from loraover_serve.vllm_server import VllmServerConfig, serve_vllm

HEALTH_S = 2.0


@dataclass(frozen=True)
class UpRequest:
    """What the command was asked for.

    Args:
        adapters: folders; requests address each by its folder's name.
        model: base model, folder or hub name; None means the adapters'.
        vllm: the command `vllm`, of any environment.
        port: None means a free one.
        log: file for the server's output; kept.
        options: further words for `vllm serve`.
    """

    adapters: tuple[Path, ...]
    model: str | None
    vllm: str
    port: int | None
    log: Path
    options: tuple[str, ...]


def serve_until_stopped(request: UpRequest) -> None:
    """Start the server, print a request that works, and wait.

    Raises:
        ConfigError: adapters of different models, of one name, or of a rank that vLLM does not take.
        EngineError: a server that does not start, refuses an adapter, or ends by itself.
    """
    config = server_config(request.adapters, request.model, request.options)
    click.echo(f"starting vLLM with {', '.join(config.adapters)}; its log is {request.log}")
    with serve_vllm(config, request.log, executable=request.vllm, port=request.port) as client:
        click.echo(f"ready: {client.url}\n\n{example_request(client, list(config.adapters))}\n\nCtrl-C stops it")
        while client.is_healthy():
            time.sleep(HEALTH_S)
    raise EngineError(f"vLLM ended by itself; see {request.log}.")


def server_config(adapters: Sequence[Path], model: str | None, options: Sequence[str] = ()) -> VllmServerConfig:
    """A server for these adapters, with the smallest --max-lora-rank that holds them all."""
    read = {path.resolve().name: read_adapter_dir(path) for path in adapters}
    if len(read) != len(adapters):
        raise ConfigError("two adapters lie in folders of one name, which requests address them by; rename one.")
    rank = max_lora_rank(max(map(largest_rank, read.values())))
    if rank is None:
        raise ConfigError(f"an adapter has rank {max(map(largest_rank, read.values()))}; vLLM takes 512 at most.")
    return VllmServerConfig(
        model=_address(read, model),
        adapters={name: adapter.path.resolve() for name, adapter in read.items()},
        max_lora_rank=rank,
        max_loras=len(read),
        options=tuple(options),
    )


def _address(adapters: dict[str, AdapterDir], model: str | None) -> str:
    """What vLLM is started with: a folder by its full path, else the hub name."""
    trained = {adapter.config.base_model_name_or_path for adapter in adapters.values()}
    if model is None and (len(trained) > 1 or None in trained):
        found = ", ".join(sorted(map(str, trained)))
        raise ConfigError(f"the adapters' base models are {found}; name the one to serve with --model.")
    source = resolve_model(str(model or trained.pop()))
    return str(Path(source.location).resolve()) if Path(source.location).is_dir() else source.name


def example_request(client: VllmClient, names: Sequence[str]) -> str:
    """A line for a shell that asks the first adapter for a completion."""
    body = json.dumps({"model": names[0], "prompt": "The capital of France is", "max_tokens": 16})
    words = ["curl", f"{client.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    return shlex.join(words)
