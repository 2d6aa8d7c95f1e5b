"""Serve exported adapters with vLLM until someone stops it."""

from __future__ import annotations

import ipaddress
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click

from loraover.checkpoint.base_model import resolve_base
from loraover.checkpoint.peft_adapter import AdapterDir, read_adapter_dir
from loraover.common.errors import ConfigError, EngineError
from loraover.models.load import ModelSource
from loraover_export.vllm.launch import max_lora_rank
from loraover_export.vllm.uniform import largest_rank
from loraover_serve.vllm.adapter_check import check_adapters
from loraover_serve.vllm.client import VllmClient
from loraover_serve.vllm.server import KEY_VARIABLE, VllmServerConfig, next_free_port, serve_vllm, vllm_version

HEALTH_S = 2.0
FIRST_PORT = 8000  # vLLM's own default
SET_BY_UP = {
    "--model": "name it with --model before the --",
    "--revision": "it is the adapters' own",
    "--host": "name it with --host before the --",
    "--port": "name it with --port before the --",
    "--uds": "the server listens on a port; name it with --port before the --",
    "--api-key": f"set {KEY_VARIABLE} in the environment, where other users of the machine do not see it",
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
        host: address or name to listen on.
        port: None means 8000, or the next free one.
        start_timeout_s: seconds until the server must have answered.
        log: file for the server's output; kept.
        options: further words for `vllm serve`.
    """

    adapters: tuple[Path, ...]
    model: str | None
    vllm: str
    host: str
    port: int | None
    log: Path
    start_timeout_s: float
    options: tuple[str, ...]


def serve_until_stopped(request: UpRequest) -> None:
    """Start the server, print a request that works, and wait.

    Raises:
        ConfigError: adapters of different models, of one name, of a rank that vLLM does not take or that vLLM would
            serve wrongly, or an option for vLLM that is not for the user to set.
        OutputError: the log cannot be written.
        EngineError: a server that does not start, refuses an adapter, or ends by itself.
    """
    check_options(request.options, SET_BY_UP)
    adapters = read_named(request.adapters)
    source = served_model(adapters, request.model)
    config = replace(server_config(adapters, source, request.options), host=request.host)
    _warn_if_open(config)
    version = vllm_version(request.vllm)
    check_adapters(adapters, source, config.model, version, lambda line: click.echo(line, err=True))
    port = _port(request)
    click.echo(f"starting vLLM with {', '.join(config.adapters)}; its log is {request.log}")
    with serve_vllm(
        config,
        request.log,
        executable=request.vllm,
        port=port,
        startup_timeout_s=request.start_timeout_s,
    ) as client:
        line = example_request(client, list(config.adapters), with_key=config.api_key() is not None)
        click.echo(f"ready: {client.url}\n\n{line}\n\nCtrl-C stops it")
        while client.is_alive():
            time.sleep(HEALTH_S)
    raise EngineError(f"vLLM ended by itself; see {request.log}.")


def check_options(options: Sequence[str], refused: Mapping[str, str]) -> None:
    """Refuse words that contradict what vLLM is told anyway; vLLM reads underscores as hyphens.

    Args:
        refused: what to do instead, by option.
    """
    for option in options:
        name = option.partition("=")[0].replace("_", "-")
        if name in refused:
            raise ConfigError(f"{name} cannot be given to vLLM here: {refused[name]}.")


def _warn_if_open(config: VllmServerConfig) -> None:
    """Warn of a server that other machines reach and that asks for no key."""
    try:
        is_loopback = ipaddress.ip_address(config.host).is_loopback
    except ValueError:
        is_loopback = config.host == "localhost"
    if not is_loopback and config.api_key() is None:
        click.echo(
            f"warning: anyone who reaches {config.host} can use this server; set {KEY_VARIABLE} in the environment to "
            "make it ask for a key",
            err=True,
        )


def _port(request: UpRequest) -> int:
    """The port that was asked for, else the first free one from vLLM's default on."""
    if request.port is not None:
        return request.port
    port = next_free_port(request.host, FIRST_PORT)
    if port != FIRST_PORT:
        click.echo(f"port {FIRST_PORT} is taken; using {port}")
    return port


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
    return resolve_base([*adapters.values()], model, option="--model", say=lambda line: click.echo(line, err=True))


def example_request(client: VllmClient, names: Sequence[str], *, with_key: bool = False) -> str:
    """A line for a shell that asks the first adapter for a completion; it names the key's variable, not the key."""
    body = json.dumps({"model": names[0], "prompt": "The capital of France is", "max_tokens": 16})
    words = ["curl", f"{client.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    return shlex.join(words) + (f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if with_key else "")
