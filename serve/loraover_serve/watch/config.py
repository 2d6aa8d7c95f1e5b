"""The configuration of a watch: servers, and the adapters on each of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from loraover.common.errors import ConfigError
from loraover.common.strict_json import StrictModel, describe
from loraover.common.strict_yaml import MAX_YAML_BYTES, parse_yaml
from loraover_serve.judge import warm_probe
from loraover_serve.judge.asker import SCREENED
from loraover_serve.judge.limits import NUMBER_FORMATS, REPEATS
from loraover_serve.judge.templates import most_requests
from loraover_serve.judge.vectors.reference import VectorReference, read_any_reference
from loraover_serve.verify.by_reference import NEAREST
from loraover_serve.verify.request import VerifyRequest

HOUR_S = 3600.0
REQUESTS_PER_PLACE = 7
"""Largest number of requests of a check for each token of the reference, beside those for the adapter alone: one for
the base model, three in mixed batches, the requests that run beside those, and one for the greedy answer."""
QUICK = 16
"""Largest number of requests of a quick check, with those that find out names and protocol."""


class AdapterSettings(StrictModel):
    """An adapter on a server."""

    reference: Path = Field(description="File of the reference; a relative path begins at the configuration's folder")
    name: str | None = Field(default=None, description="Name that requests use; None means that of the reference")
    interval_s: float | None = Field(
        default=None, gt=0, description="Seconds between checks; None means the common one"
    )
    repeats: int = Field(default=REPEATS, ge=1, description="Number of times that each question is asked")
    quick: bool = Field(
        default=False, description="Whether to send 8 requests, which only show an adapter that is lost"
    )
    without_template: bool = Field(
        default=False, description="Whether to leave out the chats that show the server's chat template"
    )
    caches_every: int = Field(
        default=0,
        ge=0,
        description="Number of checks of which one also asks the long questions, without and with the server's cache; "
        "0 asks none",
    )


class ServerSettings(StrictModel):
    """A server."""

    name: str = Field(min_length=1, description="Name on the page and in metrics")
    url: str = Field(description="Address, such as http://localhost:8000")
    adapters: list[AdapterSettings] = Field(min_length=1, description="Adapters that it serves")
    base_name: str | None = Field(default=None, description="Name of the base model there; None asks the server")
    protocol: str | None = Field(default=None, description="Protocol; None tries all")
    served_format: str = Field(
        default="bf16",
        description="Coarsest number format of the base model",
        pattern=f"^({'|'.join(NUMBER_FORMATS)})$",
    )
    key_variable: str | None = Field(default=None, description="Environment variable that holds the server's key")
    headers: list[str] = Field(default=[], description="Headers, as NAME=VARIABLE with an environment variable")
    ca_file: Path | None = Field(default=None, description="PEM file of certificates that sign the server's")
    timeout_s: float = Field(
        default=120.0, ge=1, description="Seconds that a check may take; four times as many if it asks the cache"
    )


class WatchConfig(StrictModel):
    """Contents of the configuration of a watch."""

    servers: list[ServerSettings] = Field(min_length=1, description="Servers")
    interval_s: float = Field(default=900.0, gt=0, description="Seconds between two checks of an adapter")
    jitter: float = Field(default=0.1, ge=0, le=0.5, description="Share of the interval by which it varies at random")
    budget: int = Field(default=20_000, ge=QUICK, description="Largest number of requests in any hour, to all servers")
    history: Path = Field(default=Path("watch.sqlite"), description="File of the history")
    keep_days: float = Field(default=90.0, gt=0, description="Days after which a check is forgotten")
    host: str = Field(default="127.0.0.1", description="Address of the page; 0.0.0.0 shows it to others")
    port: int = Field(default=9109, ge=0, le=65535, description="Port of the page and of /metrics; 0 takes a free one")


@dataclass(frozen=True)
class WatchTarget:
    """Adapter on a server.

    Args:
        adapter: Name of the adapter.
        request: Request of the verification.
        interval_s: Seconds between checks.
        most: Largest number of requests of a check.
        caches_every: Number of checks of which one asks the long questions; 0 asks none.
        others: Names of the server's other adapters, and the files of their references.
    """

    server: ServerSettings
    adapter: str
    request: VerifyRequest
    interval_s: float
    most: int
    caches_every: int = 0
    others: tuple[tuple[str, Path], ...] = ()

    @property
    def search(self) -> int:
        """Largest number of requests that find out which other adapter answers if a check differs."""
        return QUICK + SCREENED + NEAREST * (2 * QUICK + self.most)

    @property
    def key(self) -> tuple[str, str]:
        """Names of server and adapter."""
        return self.server.name, self.adapter


@dataclass(frozen=True)
class Watched:
    """A configuration that was checked.

    Args:
        targets: Adapters on servers, in the order of the file.
        history: File of the history.
    """

    config: WatchConfig
    targets: tuple[WatchTarget, ...]
    history: Path


def read_config(path: Path) -> Watched:
    """Read a configuration, and all references that it names.

    Args:
        path: The YAML file.

    Raises:
        ConfigError: A file that is not YAML of this form, or values that do not fit; the message names all of them.
        CheckpointError: A file that is no reference.
    """
    try:
        config = WatchConfig.model_validate(_read(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}") from error
    folder = path.resolve().parent
    targets = tuple(
        _target(config, server, adapter, folder) for server in config.servers for adapter in server.adapters
    )
    servers = Counter(server.name for server in config.servers)
    faults = [f"two servers are named {name}; name each once." for name, count in servers.items() if count > 1]
    faults += [
        f"{adapter} on {server} is named twice; name each once."
        for (server, adapter), count in Counter(target.key for target in targets).items()
        if count > 1
    ]
    faults += [
        f"{target.adapter} on {target.server.name}: a check may take {target.most} requests, more than the budget of "
        f"{config.budget} an hour; raise budget, or set quick."
        for target in targets
        if target.most > config.budget
    ]
    if faults:
        raise ConfigError(f"{path}: {' '.join(faults)}")
    beside = []
    for target in targets:
        mine = [each for each in targets if each.server.name == target.server.name and each.adapter != target.adapter]
        beside.append(replace(target, others=tuple((each.adapter, each.request.references[0]) for each in mine)))
    return Watched(config, tuple(beside), folder / config.history)


def _read(path: Path) -> dict[str, Any]:
    try:
        is_large = path.stat().st_size > MAX_YAML_BYTES
        values = None if is_large else parse_yaml(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if is_large:
        raise ConfigError(f"{path}: more than {MAX_YAML_BYTES} bytes.")
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys such as servers and interval_s.")
    return values


def _target(config: WatchConfig, server: ServerSettings, adapter: AdapterSettings, folder: Path) -> WatchTarget:
    file = folder / adapter.reference
    if file.is_dir():
        raise ConfigError(f"{file}: a folder; name the file of one reference.")
    reference = read_any_reference(file)
    most = QUICK
    if isinstance(reference, VectorReference):
        most = reference.most_requests(1 if adapter.quick else adapter.repeats)
        if adapter.caches_every:
            raise ConfigError(f"{file}: has vectors, but caches_every checks generated text; leave caches_every out.")
    elif not adapter.quick:
        most += (REQUESTS_PER_PLACE + adapter.repeats) * len(reference.places)
        most += SCREENED if reference.other_bases else 0
        most += 0 if adapter.without_template else most_requests(reference.conversations)
    name = adapter.name or reference.adapter_name
    try:
        if adapter.caches_every and not isinstance(reference, VectorReference):
            most += warm_probe.most_requests(warm_probe.long_questions(reference, lambda field: f"{field}_every"))
        request = VerifyRequest(
            references=(file,),
            endpoint=server.url,
            served_name=(name,),
            base_name=server.base_name,
            key_variable=server.key_variable,
            headers=tuple(server.headers),
            ca_file=None if server.ca_file is None else folder / server.ca_file,
            protocol=server.protocol,
            served_format=server.served_format,
            timeout_s=server.timeout_s,
            check_timeout_s=server.timeout_s,
            repeats=adapter.repeats,
            quick=adapter.quick,
            caches=adapter.caches_every > 0,
            without_template=adapter.without_template,
        )
    except ConfigError as error:
        raise ConfigError(f"{name} on {server.name}: {error}") from error
    return WatchTarget(server, name, request, adapter.interval_s or config.interval_s, most, adapter.caches_every)
