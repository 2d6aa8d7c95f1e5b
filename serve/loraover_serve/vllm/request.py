"""Arguments of `serve_adapters`, and those of every verb that starts vLLM."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from loraover.adapters.uniform.request_fields import (
    DEFAULT_MAX_LORA_RANK,
    MAX_LORA_RANKS,
    approximate_to_rank,
    given_adapter,
)
from loraover.common.request import AnyName, AnyNames, AnyPath, AnyPaths, Request, declarations, option
from loraover_serve.plugin.settings import DEFAULT_CACHE, DEFAULT_SETTLE_S, MOST_SETTLE_S

COMMAND_VARIABLE = "LORAOVER_VLLM"
"""The environment variable that names the command `vllm` of another environment."""

LAST_PORT = 65535
LOOPBACK = "127.0.0.1"
STARTUP_S = 600.0
MOST_STARTUP_S = 1_000_000.0
"""Longest time to start, twelve days; Python waits for a process for 25 days at most."""
KEY_VARIABLE = "VLLM_API_KEY"
"""The environment variable that vLLM reads the server's key from; on a command line, every user would see it."""

LORA_TARGETS, TOWERS = "--lora-target-modules", "--enable-tower-connector-lora"
"""Options of `vllm serve` that leave modules of adapters out, and that adapt more modules."""

SET_BY_SERVE = {
    "--model": "name it with {model}, not in {options}",
    "--revision": "the adapters name it",
    "--host": "name it with {host}, not in {options}",
    "--port": "name it with {port}, not in {options}",
    "--uds": "the server listens on a port; name it with {port}, not in {options}",
    **dict.fromkeys(
        ("--ssl-certfile", "--ssl-keyfile"),
        "the server is asked over plain HTTP; put a proxy that speaks TLS before it, such as nginx",
    ),
    "--api-key": f"set {KEY_VARIABLE} in the environment, where other users of the machine do not see it",
    "--hf-token": "set HF_TOKEN in the environment, where other users of the machine do not see it",
    "--served-model-name": "requests address the base model by its name; rename an adapter's folder to rename it",
    "--enable-lora": "it is always on",
    "--lora-modules": "name each adapter's folder in {adapters}",
    "--max-lora-rank": "it is the smallest rank that holds the adapters; with {folder}, give {max_lora_rank}",
}
"""Options of `vllm serve` that `serve_adapters` sets or relies on, and what to do instead of giving them."""


def vllm_command(given: AnyName | None = None) -> str:
    """The command that starts vLLM: the given one, else $LORAOVER_VLLM, else `vllm`."""
    return str(given or os.environ.get(COMMAND_VARIABLE) or "vllm")


@dataclass(frozen=True, kw_only=True)
class ServerRequest(Request):
    """Arguments of every verb that starts vLLM."""

    refused: ClassVar[Mapping[str, str]] = SET_BY_SERVE
    """Advice in place of an option of `vllm serve`, by the option's name."""

    model: AnyName | None = option(
        "Base model, folder or hub name.", default=None, default_text="the base model that the adapters name"
    )
    vllm: AnyName = option(
        "Command that starts vLLM, in any environment.",
        default=None,
        default_text=f"${COMMAND_VARIABLE}, or vllm",
        converts=vllm_command,
    )
    start_timeout_s: float = option(
        "Seconds that an engine may take until its first answers.",
        default=STARTUP_S,
        flag="--start-timeout",
        least=1,
        most=MOST_STARTUP_S,
    )
    options: AnyNames = option("Further words for `vllm serve`.", default=(), is_rest=True, metavar="VLLM OPTIONS")

    def faults(self) -> Iterator[str]:
        named = {name: self.named(name) for name in declarations(type(self))}
        for name in (word.partition("=")[0].replace("_", "-") for word in self.options):  # as vLLM reads them
            if name in self.refused:
                yield f"{name} cannot be given to vLLM here: {self.refused[name].format_map(named)}."


@dataclass(frozen=True)
class ServeRequest(ServerRequest):
    """Start vLLM with adapters, and print a request that works.

    Each ADAPTER is a folder that `loraover export vllm` has written; requests address the adapter by the folder's name.
    Adapters that vLLM would refuse, or would serve wrongly without a message, are refused before it starts.

    The server is ready when the base model and each adapter have answered. Ctrl-C, SIGTERM and SIGHUP stop it. If the
    environment variable VLLM_API_KEY is set, the server asks for that key.

    With --adapters, every adapter in a folder is served by its name: those of other kinds than LoRA too, and those that
    are put there later. Each is prepared at the first request for it, or refused with the reason, and served anew when
    its folder has changed. vLLM's environment needs this package for that: pip install ".[load]" in a clone of
    LoRA-Over.

    Words after -- are passed to `vllm serve`, except options that this command sets itself, such as --port.
    """

    verb = "loraover serve up"
    examples = (
        "loraover serve up for-vllm",
        "loraover serve up shop support --port 8080 -- --max-model-len 2048",
        "loraover serve up --adapters /adapters --model ./Qwen3-0.6B --max-lora-rank 32 -- --max-loras 4",
    )
    json_help = None

    adapters: AnyPaths = given_adapter(
        "Adapters, which requests address by their folders' or repositories' names",
        default=(),
        default_text="none, with --adapters",
        metavar="ADAPTER...",
    )
    folder: AnyPath | None = option(
        "Folder of adapters of any kind, each of which is prepared at the first request for its name.",
        default=None,
        flag="--adapters",
    )
    max_lora_rank: int = option(
        "Largest rank that the server takes of the adapters in that folder. On a CPU, vLLM computes all adapters at "
        "this rank, so a larger one is slower.",
        default=DEFAULT_MAX_LORA_RANK,
        needs="folder",
    )
    cache: AnyPath | None = option(
        "Folder of prepared adapters, which servers may share.",
        default=None,
        default_text=DEFAULT_CACHE,
        needs="folder",
    )
    approximate_to_rank: int | None = approximate_to_rank(former=("--approximate",), needs="folder")
    reload: bool = option(
        "Reload an adapter when its folder has changed; otherwise the version that was loaded first is served.",
        default=True,
        needs="folder",
    )
    settle_s: float = option(
        "Seconds for which an adapter's files have to be unchanged before they are read.",
        default=DEFAULT_SETTLE_S,
        flag="--settle",
        least=0,
        most=MOST_SETTLE_S,
        needs="folder",
    )
    host: str = option("Address or host name that the server listens on.", default=LOOPBACK)
    port: int | None = option(
        "Port that the server listens on.",
        default=None,
        default_text="8000 or the next free one",
        least=1,
        most=LAST_PORT,
    )
    log: AnyPath = option("File for the server's output, which is kept.", default="vllm.log")

    def faults(self) -> Iterator[str]:
        yield from super().faults()
        if (self.folder is None) == (not self.adapters):
            each, all_of_them = self.named("adapters"), self.named("folder")
            yield f"name folders of adapters in {each}, or one folder of all with {all_of_them}."
        if self.folder is not None and any(
            word.partition("=")[0].replace("_", "-") == LORA_TARGETS for word in self.options
        ):
            yield (
                f"{LORA_TARGETS} cannot be given to vLLM here: it leaves modules out of the adapters in "
                f"{self.named('folder')} without a message; leave it out."
            )
        if self.folder is not None and self.model is None:
            yield f"{self.named('folder')} needs {self.named('model')}, since the adapters may name several models."
        if self.folder is not None and not self.folder.is_dir():
            yield f"{self.named('folder', str(self.folder))}: no such folder."
        if self.max_lora_rank not in MAX_LORA_RANKS:
            allowed = ", ".join(map(str, MAX_LORA_RANKS))
            yield f"{self.named('max_lora_rank')} is {self.max_lora_rank}, expected one of {allowed}."
        if self.approximate_to_rank is not None and self.approximate_to_rank > self.max_lora_rank:
            yield (
                f"{self.named('approximate_to_rank')} is {self.approximate_to_rank}, more than "
                f"{self.named('max_lora_rank')}, which is {self.max_lora_rank}; lower one or raise the other."
            )
