"""Arguments of `serve_adapters`, and those of every verb that starts vLLM."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loraover.common.request import AnyName, AnyNames, AnyPath, AnyPaths, Request, argument, declarations, option

COMMAND_VARIABLE = "LORAOVER_VLLM"
"""The environment variable that names the command `vllm` of another environment."""

LAST_PORT = 65535
LOOPBACK = "127.0.0.1"
STARTUP_S = 600.0
KEY_VARIABLE = "VLLM_API_KEY"
"""The environment variable that vLLM reads the server's key from; on a command line, every user would see it."""

SET_BY_SERVE = {
    "--model": "name it with {model}, not in {options}",
    "--revision": "the adapters name it",
    "--host": "name it with {host}, not in {options}",
    "--port": "name it with {port}, not in {options}",
    "--uds": "the server listens on a port; name it with {port}, not in {options}",
    "--api-key": f"set {KEY_VARIABLE} in the environment, where other users of the machine do not see it",
    "--hf-token": "set HF_TOKEN in the environment, where other users of the machine do not see it",
    "--served-model-name": "requests address the base model by its name; rename an adapter's folder to rename it",
    "--enable-lora": "it is always on",
    "--lora-modules": "name each adapter's folder in {adapters}",
    "--max-lora-rank": "it is the smallest rank that holds the adapters",
}
"""Options of `vllm serve` that `serve_adapters` sets or relies on, and what to do instead of giving them."""


def vllm_command(given: AnyName | None = None) -> str:
    """The command that starts vLLM: the given one, else $LORAOVER_VLLM, else `vllm`."""
    return str(given or os.environ.get(COMMAND_VARIABLE) or "vllm")


def base_model() -> Any:
    """Declare the field `model`, the base model of adapters."""
    return option("Base model, folder or hub name.", default=None, default_text="the base model that the adapters name")


def vllm() -> Any:
    """Declare the field `vllm`, the command that starts vLLM."""
    return option(
        "Command that starts vLLM, in any environment.",
        default=None,
        default_text=f"${COMMAND_VARIABLE}, or vllm",
        converts=vllm_command,
    )


def start_timeout() -> Any:
    """Declare the field `start_timeout_s`."""
    return option(
        "Seconds that an engine may take until its first answers.", default=STARTUP_S, flag="--start-timeout", least=1
    )


def vllm_words() -> Any:
    """Declare the field `options`, words for `vllm serve`."""
    return option("Further words for `vllm serve`.", default=(), is_rest=True, metavar="VLLM OPTIONS")


def graph() -> Any:
    """Declare the field `graph`, an export whose graph ONNX Runtime runs."""
    return option(
        "Folder of an earlier swappable ONNX export, whose graph ONNX Runtime runs with the adapters.",
        default=None,
        default_text="graphs that are built for the run",
    )


def option_faults(request: Request, options: AnyNames, refused: Mapping[str, str]) -> Iterator[str]:
    """Yield messages about words for `vllm serve` that contradict the other arguments of a request.

    Args:
        request: the request.
        options: its words for `vllm serve`, which reads underscores as hyphens.
        refused: what to do instead of giving an option, by its name.
    """
    named = {name: request.named(name) for name in declarations(type(request))}
    for name in (word.partition("=")[0].replace("_", "-") for word in options):
        if name in refused:
            yield f"{name} cannot be given to vLLM here: {refused[name].format_map(named)}."


@dataclass(frozen=True)
class ServeRequest(Request):
    """Start vLLM with adapters, and print a request that works.

    Each ADAPTER is a folder that `loraover export vllm` has written; requests address the adapter by the folder's name.
    Adapters that vLLM would refuse, or would serve wrongly without a message, are refused before it starts.

    The server is ready when the base model and each adapter have answered. Ctrl-C, SIGTERM and SIGHUP stop it. If the
    environment variable VLLM_API_KEY is set, the server asks for that key.

    Words after -- are passed to `vllm serve`, except options that this command sets itself, such as --port.
    """

    verb = "loraover serve up"
    examples = (
        "loraover serve up for-vllm",
        "loraover serve up shop support --port 8080 -- --max-model-len 2048",
    )
    json_help = None

    adapters: AnyPaths = argument(
        "Folders of the adapters; requests address each adapter by its folder's name.", metavar="ADAPTER..."
    )
    model: AnyName | None = base_model()
    vllm: AnyName = vllm()
    host: str = option("Address or host name that the server listens on.", default=LOOPBACK)
    port: int | None = option(
        "Port that the server listens on.",
        default=None,
        default_text="8000 or the next free one",
        least=1,
        most=LAST_PORT,
    )
    log: AnyPath = option("File for the server's output, which is kept.", default="vllm.log")
    start_timeout_s: float = start_timeout()
    options: AnyNames = vllm_words()

    def faults(self) -> Iterator[str]:
        yield from option_faults(self, self.options, SET_BY_SERVE)
