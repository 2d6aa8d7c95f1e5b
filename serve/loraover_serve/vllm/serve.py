"""Serve adapters with vLLM during a block, after the checks of `loraover export vllm`."""

from __future__ import annotations

import ipaddress
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from loraover.checkpoint.base_model import resolve_base
from loraover.checkpoint.peft_adapter import AdapterDir, read_adapter_dir
from loraover.common.errors import ConfigError
from loraover.common.reporter import SILENT, Reporter
from loraover.models.load import ModelSource
from loraover_export.uniform.matrices import largest_rank
from loraover_export.vllm.launch import max_lora_rank
from loraover_serve.vllm.adapter_check import check_adapters
from loraover_serve.vllm.command import vllm_command
from loraover_serve.vllm.server import (
    KEY_VARIABLE,
    LAST_PORT,
    LOOPBACK,
    STARTUP_S,
    VllmServer,
    VllmServerConfig,
    next_free_port,
    serve_vllm,
    vllm_version,
)

FIRST_PORT = 8000  # vLLM's own default
SET_BY_SERVE = {
    "--model": "name it with --model before the --",
    "--revision": "the adapters name it",
    "--host": "name it with --host before the --",
    "--port": "name it with --port before the --",
    "--uds": "the server listens on a port; name it with --port before the --",
    "--api-key": f"set {KEY_VARIABLE} in the environment, where other users of the machine do not see it",
    "--hf-token": "set HF_TOKEN in the environment, where other users of the machine do not see it",
    "--served-model-name": "requests address the base model by its name; rename an adapter's folder to rename it",
    "--enable-lora": "it is always on",
    "--lora-modules": "name each adapter's folder before the --",
    "--max-lora-rank": "it is the smallest rank that holds the adapters",
}
"""Options of `vllm serve` that `serve_adapters` sets or relies on, and what to do instead of giving them."""


@dataclass(frozen=True)
class ServeRequest:
    """The arguments of `serve_adapters`, which documents them.

    Raises:
        ConfigError: an argument that cannot be used.
    """

    adapters: tuple[Path, ...]
    model: str | None
    vllm: str
    host: str
    port: int | None
    log: Path
    start_timeout_s: float
    options: tuple[str, ...]

    def __post_init__(self) -> None:
        faults = option_faults(self.options, SET_BY_SERVE)
        if not self.adapters:
            faults.append("no adapter was given; name one folder at least.")
        if self.port is not None and not 1 <= self.port <= LAST_PORT:
            faults.append(f"port is {self.port}, expected 1 to {LAST_PORT}.")
        if not self.start_timeout_s > 0:
            faults.append(f"start_timeout_s is {self.start_timeout_s}, expected more than 0 seconds.")
        if faults:
            raise ConfigError(" ".join(faults))


def serve_adapters(
    adapters: Sequence[str | Path] | str | Path,
    *,
    model: str | Path | None = None,
    vllm: str | Path | None = None,
    host: str = LOOPBACK,
    port: int | None = None,
    log: str | Path = "vllm.log",
    start_timeout_s: float = STARTUP_S,
    options: Sequence[str] = (),
    report: Reporter = SILENT,
) -> AbstractContextManager[VllmServer]:
    """Start vLLM with adapters, and stop it after the block.

        with serve_adapters(["shop"]) as server:
            print(server.ask("shop", "Where is my parcel?"))

    Adapters that vLLM would refuse, or would serve wrongly without a message, are refused before it starts. The block
    begins when the base model and each adapter have answered. The server asks for the key in the environment variable
    VLLM_API_KEY, if that is set, and the client sends it. During the block SIGTERM and SIGHUP raise KeyboardInterrupt,
    so that no server is left running.

    Args:
        adapters: folders of the adapters; requests address each adapter by its folder's name.
        model: base model, folder or hub name; None means the one that the adapters name.
        vllm: command that starts vLLM, in any environment; None means $LORAOVER_VLLM, or `vllm` if that is not set.
        host: address or name that the server listens on.
        port: port that the server listens on; None means 8000, or the next free one.
        log: file for everything that the server prints; it is kept.
        start_timeout_s: seconds that the server may take until its first answers.
        options: further words for `vllm serve`.
        report: receiver of progress and warnings.

    Returns:
        A context manager, whose block gets a client of the running server.

    Raises:
        ConfigError: an argument that cannot be used, or adapters of different models, of one name or that vLLM cannot
            serve.
        EngineError: a server that does not start, or that refuses an adapter; the message has the end of the log.
        OutputError: a log that cannot be written.
    """
    folders = [adapters] if isinstance(adapters, str | Path) else adapters
    request = ServeRequest(
        adapters=tuple(map(Path, folders)),
        model=None if model is None else str(model),
        vllm=vllm_command(vllm),
        host=host,
        port=port,
        log=Path(log),
        start_timeout_s=start_timeout_s,
        options=tuple(options),
    )
    return _serving(request, report)


@contextmanager
def _serving(request: ServeRequest, report: Reporter) -> Iterator[VllmServer]:
    adapters = read_named(request.adapters)
    source = served_model(adapters, request.model, report)
    config = replace(server_config(adapters, source, request.options), host=request.host)
    _warn_if_open(config, report)
    check_adapters(adapters, source, config.model, vllm_version(request.vllm), report)
    port = _port(request, report)
    report.line(f"starting vLLM with {', '.join(config.adapters)}; its log is {request.log}")
    with serve_vllm(
        config,
        request.log,
        executable=request.vllm,
        port=port,
        startup_timeout_s=request.start_timeout_s,
    ) as server:
        yield server


def option_faults(options: Sequence[str], refused: Mapping[str, str]) -> list[str]:
    """Messages about words for `vllm serve` that contradict its other arguments.

    Args:
        options: words for `vllm serve`, which reads underscores as hyphens.
        refused: what to do instead of giving an option, by its name.
    """
    names = (option.partition("=")[0].replace("_", "-") for option in options)
    return [f"{name} cannot be given to vLLM here: {refused[name]}." for name in names if name in refused]


def _warn_if_open(config: VllmServerConfig, report: Reporter) -> None:
    """Warn of a server that other machines reach and that asks for no key."""
    try:
        is_loopback = ipaddress.ip_address(config.host).is_loopback
    except ValueError:
        is_loopback = config.host == "localhost"
    if not is_loopback and config.api_key() is None:
        report.line(
            f"warning: anyone who reaches {config.host} can use this server; set {KEY_VARIABLE} in the environment to "
            "make it ask for a key"
        )


def _port(request: ServeRequest, report: Reporter) -> int:
    """The requested port, else the first free one from vLLM's default on."""
    if request.port is not None:
        return request.port
    port = next_free_port(request.host, FIRST_PORT)
    if port != FIRST_PORT:
        report.line(f"port {FIRST_PORT} is taken; using {port}")
    return port


def read_named(adapters: Sequence[Path]) -> dict[str, AdapterDir]:
    """Adapters by the names of their folders, which requests address them by.

    Raises:
        ConfigError: two folders of one name.
        CheckpointError: a folder that holds no adapter.
    """
    read = {path.resolve().name: read_adapter_dir(path) for path in adapters}
    if len(read) != len(adapters):
        raise ConfigError("two adapters lie in folders of one name, which requests address them by; rename one.")
    return read


def server_config(
    adapters: Mapping[str, AdapterDir], model: ModelSource, options: Sequence[str] = ()
) -> VllmServerConfig:
    """A server for a model and these adapters, with the smallest --max-lora-rank that holds them all.

    Args:
        adapters: adapters by the names that requests use.
        model: the base model.
        options: further words for `vllm serve`.

    Raises:
        ConfigError: a rank that vLLM does not take.
    """
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


def served_model(adapters: Mapping[str, AdapterDir], model: str | None, report: Reporter = SILENT) -> ModelSource:
    """The base model to serve: the requested one, else the one that the adapters were trained on, at its revision."""
    return resolve_base([*adapters.values()], model, option="--model", say=report.line)


def example_request(server: VllmServer) -> str:
    """A line for a shell that asks the first adapter for a completion; it names the key's variable, not the key."""
    body = json.dumps({"model": server.names[0], "prompt": "The capital of France is", "max_tokens": 16})
    words = ["curl", f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    return shlex.join(words) + (f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if server.asks_for_key else "")
