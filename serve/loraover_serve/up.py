"""Serve exported adapters with vLLM until someone stops it."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from loraover.adapter_dir import AdapterDir, read_adapter_dir
from loraover.base_model import resolve_base
from loraover.errors import ConfigError, EngineError
from loraover.models import ModelSource
from loraover_export.vllm.launch import max_lora_rank
from loraover_export.vllm.uniform import largest_rank
from loraover_serve.vllm_client import VllmClient
from loraover_serve.vllm_server import VllmServerConfig, serve_vllm

HEALTH_S = 2.0
SET_BY_UP = {
    "--model": "name it with --model before the --",
    "--revision": "it is the adapters' own",
    "--host": "the server listens on the loopback interface only; put a proxy before it",
    "--port": "name it with --port before the --",
    "--uds": "the server listens on the loopback interface only; put a proxy before it",
    "--api-key": "only this machine reaches the server; put a proxy before it",
    "--served-model-name": "requests address the base model by its name; rename an adapter's folder to rename it",
    "--enable-lora": "it is always on",
    "--lora-modules": "name each adapter's folder before the --",
    "--max-lora-rank": "it is the smallest that holds the adapters",
}
"""Words for `vllm serve` that `up` sets or relies on, and what to do instead."""


@dataclass(frozen=True)
class UpRequest:
    """What the command was asked for.

    Args:
        adapters: folders; requests address each by its folder's name.
        model: base model, folder or hub name; None means the adapters'.
        vllm: the command `vllm`, of any environment.
        port: None means a free one.
        start_timeout_s: seconds until the server must have answered.
        log: file for the server's output; kept.
        options: further words for `vllm serve`.
    """

    adapters: tuple[Path, ...]
    model: str | None
    vllm: str
    port: int | None
    log: Path
    start_timeout_s: float
    options: tuple[str, ...]


def serve_until_stopped(request: UpRequest) -> None:
    """Start the server, print a request that works, and wait.

    Raises:
        ConfigError: adapters of different models, of one name, or of a rank that vLLM does not take, or an option for
            vLLM that is not for the user to set.
        OutputError: the log cannot be written.
        EngineError: a server that does not start, refuses an adapter, or ends by itself.
    """
    _check_options(request.options)
    adapters = read_named(request.adapters)
    config = server_config(adapters, served_model(adapters, request.model), request.options)
    click.echo(f"starting vLLM with {', '.join(config.adapters)}; its log is {request.log}")
    with serve_vllm(
        config,
        request.log,
        executable=request.vllm,
        port=request.port,
        startup_timeout_s=request.start_timeout_s,
    ) as client:
        click.echo(f"ready: {client.url}\n\n{example_request(client, list(config.adapters))}\n\nCtrl-C stops it")
        while client.is_alive():
            time.sleep(HEALTH_S)
    raise EngineError(f"vLLM ended by itself; see {request.log}.")


def _check_options(options: Sequence[str]) -> None:
    """Refuse words that contradict what `up` tells vLLM; vLLM reads underscores as hyphens."""
    for option in options:
        name = option.partition("=")[0].replace("_", "-")
        if name in SET_BY_UP:
            raise ConfigError(f"{name} cannot be given to vLLM here: {SET_BY_UP[name]}.")


def read_named(adapters: Sequence[Path]) -> dict[str, AdapterDir]:
    """Adapters by the names of their folders, which requests address them by."""
    read = {path.resolve().name: read_adapter_dir(path) for path in adapters}
    if len(read) != len(adapters):
        raise ConfigError("two adapters lie in folders of one name, which requests address them by; rename one.")
    return read


def server_config(
    adapters: Mapping[str, AdapterDir], model: ModelSource, options: Sequence[str] = ()
) -> VllmServerConfig:
    """A server for a model and these adapters, with the smallest --max-lora-rank that holds them all."""
    largest = max(map(largest_rank, adapters.values()), default=1)
    rank = max_lora_rank(largest)
    if rank is None:
        raise ConfigError(f"an adapter has rank {largest}; vLLM takes 512 at most.")
    is_folder = Path(model.location).is_dir()
    return VllmServerConfig(
        model=str(Path(model.location).resolve()) if is_folder else model.location,
        adapters={name: adapter.path.resolve() for name, adapter in adapters.items()},
        max_lora_rank=rank,
        max_loras=max(1, len(adapters)),
        revision=model.revision,
        options=tuple(options),
    )


def served_model(adapters: Mapping[str, AdapterDir], model: str | None) -> ModelSource:
    """The base model to serve: the one asked for, else the one that the adapters were trained on, at their revision."""
    return resolve_base([*adapters.values()], model, option="--model", say=click.echo)


def example_request(client: VllmClient, names: Sequence[str]) -> str:
    """A line for a shell that asks the first adapter for a completion."""
    body = json.dumps({"model": names[0], "prompt": "The capital of France is", "max_tokens": 16})
    words = ["curl", f"{client.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    return shlex.join(words)
