"""Serve adapters with vLLM during a block, after the checks of `loraover export vllm`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from loraover.adapters.uniform.request_fields import max_lora_rank
from loraover.checkpoint.base_model import resolve_base
from loraover.checkpoint.model_facts import read_served
from loraover.checkpoint.peft_adapter import AdapterDir, read_adapter_dir, read_on_base
from loraover.common.errors import ConfigError, EngineError, printable
from loraover.common.extras import install
from loraover.common.hosts import is_near
from loraover.common.reporter import Reporter
from loraover.models.load import ModelSource, resolve_model
from loraover.sources.address import name_of
from loraover.sources.verb import verb
from loraover_export.formats.vllm.candidate import Candidate
from loraover_export.formats.vllm.releases import architectures_of
from loraover_export.formats.vllm.rules import Violation, preflight
from loraover_export.known_faults import Platform
from loraover_serve.plugin.settings import ADAPTERS, APPROXIMATE, CACHE, PLUGIN, RELOAD, SETTLE
from loraover_serve.vllm.client import VllmServer
from loraover_serve.vllm.request import KEY_VARIABLE, LORA_TARGETS, TOWERS, ServeRequest
from loraover_serve.vllm.server import VllmServerConfig, next_free_port, serve_vllm, vllm_version

FIRST_PORT = 8000  # vLLM's own default


@verb(ServeRequest)
def serve_adapters(request: ServeRequest) -> AbstractContextManager[VllmServer]:
    """Start vLLM with adapters, and stop it after the block.

        with serve_adapters(["shop"]) as server:
            print(server.ask("shop", "Where is my parcel?"))

    Adapters that vLLM would refuse, or would serve wrongly without a message, are refused before it starts. The block
    begins when the base model and each adapter have answered. The server asks for the key in the environment variable
    VLLM_API_KEY, if that is set, and the client sends it. During the block SIGTERM and SIGHUP raise KeyboardInterrupt,
    so that no server is left running.

    Returns:
        A context manager, whose block gets a client of the running server.

    Raises:
        ConfigError: An argument that cannot be used, or adapters of different models, of one name or that vLLM cannot
            serve.
        EngineError: A server that does not start, or that refuses an adapter; the message has the end of the log.
        OutputError: A log that cannot be written.
    """
    return _serving(request)


@contextmanager
def _serving(request: ServeRequest) -> Iterator[VllmServer]:
    report = request.report
    if request.folder is None:
        adapters = read_named(request.adapters, request.addresses.get("adapters", ()))
        source = resolve_base([*adapters.values()], request.model, option=request.named("model"), say=report.line)
        config = server_config(adapters, source, request.options)
        check_adapters(adapters, source, config.model, vllm_version(request.vllm), report, request.options)
        what = ", ".join(config.adapters)
    else:
        assert request.model is not None
        cache = {} if request.cache is None else {CACHE: str(request.cache.absolute())}
        approximate = {} if request.approximate_to_rank is None else {APPROXIMATE: str(request.approximate_to_rank)}
        config = replace(
            server_config({}, resolve_model(request.model), request.options),
            max_lora_rank=request.max_lora_rank,
            plugin={
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
                "VLLM_PLUGINS": PLUGIN,
                ADAPTERS: str(request.folder.resolve()),
                RELOAD: str(int(request.reload)),
                SETTLE: str(request.settle_s),
                **cache,
                **approximate,
            },
        )
        what = f"the adapters in {request.folder}"
    config = replace(config, host=request.host)
    if not is_near(config.host) and config.api_key() is None:
        report.line(
            f"warning: anyone who reaches {config.host} can use this server; set {KEY_VARIABLE} in the environment to "
            "make it ask for a key"
        )
    port = next_free_port(request.host, FIRST_PORT) if request.port is None else request.port
    if request.port is None and port != FIRST_PORT:
        report.line(f"port {FIRST_PORT} is taken; using {port}")
    report.line(f"starting vLLM with {what}; its log is {request.log}")
    limit = request.start_timeout_s
    with serve_vllm(config, request.log, executable=request.vllm, port=port, startup_timeout_s=limit) as server:
        if request.folder is not None:
            _check_plugin(server, request)
        yield server


def _check_plugin(server: VllmServer, request: ServeRequest) -> None:
    """Raise EngineError unless the server has the plug-in's routes, and warn if it does not serve changes."""
    try:
        found = server.request("/v1/adapters")
    except EngineError as error:
        raise EngineError(
            f"the server of {request.vllm} has no plug-in: {error} Install it in vLLM's environment: {install('load')}."
        ) from error
    if request.reload and not found.get("reloads"):
        request.report.line(
            f"warning: changed folders are not reloaded, since this release of vLLM is not known; see {request.log}"
        )


def lora_targets(options: Sequence[str]) -> frozenset[str]:
    """Return the values of --lora-target-modules among words for `vllm serve`."""
    found: set[str] = set()
    is_value = False
    for word in options:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            is_value = name.replace("_", "-") == LORA_TARGETS
            found |= {value} if is_value and value else set()
        elif is_value:
            found.add(word)
    return frozenset(found)


def adapts_towers(options: Sequence[str]) -> bool:
    """Return whether words for `vllm serve` turn --enable-tower-connector-lora on; the last one counts."""
    switches = {TOWERS: True, TOWERS.replace("--", "--no-", 1): False}
    given = [switches[name] for word in options if (name := word.replace("_", "-")) in switches]
    return given[-1:] == [True]


def check_adapters(
    adapters: Mapping[str, AdapterDir],
    source: ModelSource,
    address: str,
    version: str | None,
    report: Reporter,
    options: Sequence[str] = (),
) -> None:
    """Apply the rules of a release of vLLM, such as "0.32.0+cpu", to every adapter, and report its warnings.

    The options are further words for `vllm serve`, which may leave out modules of an adapter, or adapt more of them.

    Raises:
        CheckpointError: LoRA of experts that does not fit the model.
        ConfigError: An adapter that vLLM refuses or would serve wrongly without a message.
    """
    known = architectures_of(version)
    if version is None:
        report.line(f"the command vllm prints no version; the rules of {known.version} are applied")
    served = read_served(source, known.lora)
    platform: Platform | None = None
    if version is not None:  # the label of a build names its kind of device; PyPI's, for CUDA, has none
        label = version.partition("+")[2]
        platform = "cpu" if label.startswith("cpu") else "cuda" if label == "" or label.startswith("cu") else None
    found: dict[Violation, list[str]] = {}
    for name, adapter in adapters.items():
        placed = read_on_base(adapter, served.experts) if served.architecture in known.lora else adapter
        subject = Candidate(
            *(placed, served, known, name, address, None),
            platform=platform,
            lora_targets=lora_targets(options),
            adapts_towers=adapts_towers(options),
        )
        checked = preflight(subject)
        for finding in checked.findings:
            found.setdefault(finding, []).append(name)
    for finding, names in found.items():
        if finding.level == "warning":
            report.line(printable(f"warning: {_described(finding, names)}"))
    errors = [_described(finding, names) for finding, names in found.items() if finding.level == "error"]
    if errors:
        raise ConfigError(f"vLLM was not started: {'; '.join(errors)}")


def _described(finding: Violation, names: list[str]) -> str:
    return f"{', '.join(names)}: {finding.rule}: {finding.found}; remedy: {finding.remedy}"


def read_named(adapters: Sequence[Path], addresses: Sequence[str | Path] = ()) -> dict[str, AdapterDir]:
    """Return adapters by the names of their folders, or of the addresses that they were named by, in the same order.

    Raises:
        ConfigError: Two folders of one name.
        CheckpointError: A folder that holds no adapter.
    """
    named = zip(addresses or adapters, adapters, strict=True)
    read = {name_of(address): read_adapter_dir(path) for address, path in named}
    if len(read) != len(adapters):
        raise ConfigError(
            "two adapters are in folders with the same name, by which requests choose an adapter; rename "
            "one of the folders."
        )
    return read


def server_config(
    adapters: Mapping[str, AdapterDir], model: ModelSource, options: Sequence[str] = ()
) -> VllmServerConfig:
    """A server for a model and these adapters, with the smallest --max-lora-rank that holds them all.

    Args:
        adapters: Adapters by the names that requests use.
        model: The base model.
        options: Further words for `vllm serve`.

    Raises:
        ConfigError: A rank that vLLM does not take.
    """
    largest = max((adapter.rank for adapter in adapters.values()), default=1)
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


def example_request(server: VllmServer) -> str:
    """A line for a shell that asks the first adapter for a completion; it names the key's variable, not the key.

    NAME stands for an adapter of the plug-in, which knows them only when they are asked for.
    """
    name = server.names[0] if server.names else "NAME"
    body = json.dumps({"model": name, "prompt": "The capital of France is", "max_tokens": 16})
    words = ["curl", f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    return shlex.join(words) + (f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if server.asks_for_key else "")
