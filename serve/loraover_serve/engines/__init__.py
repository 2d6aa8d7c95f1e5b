"""Inference engines that verify and parity start, one file each; a new one is a file here and a line in `ENGINES`.

The arguments that both verbs take stand here as well.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pkgutil import resolve_name as imported
from threading import TIMEOUT_MAX
from typing import TYPE_CHECKING

from loraover.common.request import AnyPath, declarations, option
from loraover_serve.vllm.request import ServerRequest

if TYPE_CHECKING:
    from loraover_serve.engines.base import Engine


@dataclass(frozen=True)
class EngineEntry:
    """Facts about an engine for commands, `loraover doctor` and the documentation, which do not import it.

    Args:
        title: The engine's usual name.
        place: Place of its class, as "module:name".
        takes: Files that it loads.
        options: Fields of requests that are for this engine alone.
        is_timed: Whether parity can measure it: its class is a `TimedEngine`.
        is_batching: Whether it answers several requests at once: its class is a `BatchingEngine`.
    """

    title: str
    place: str
    takes: str
    options: tuple[str, ...] = ()
    is_timed: bool = False
    is_batching: bool = False


_HERE = "loraover_serve.engines"
_UNIFORM = "adapters that `loraover export vllm` writes"
ENGINES = {
    "vllm": EngineEntry(
        "vLLM",
        f"{_HERE}.vllm:VllmEngine",
        _UNIFORM,
        options=("options", "max_concurrency", "cross_check"),
        is_timed=True,
        is_batching=True,
    ),
    "onnx": EngineEntry(
        "ONNX Runtime GenAI",
        f"{_HERE}.onnx:OnnxEngine",
        "ONNX graphs of language models, with adapters that `loraover export onnx` writes",
        options=("graph",),
        is_timed=True,
    ),
    "llamacpp": EngineEntry(
        "llama.cpp",
        f"{_HERE}.llamacpp:LlamaCppEngine",
        "adapters that `loraover export gguf` writes",
        options=("base_gguf",),
    ),
    "mlx": EngineEntry("mlx-lm", f"{_HERE}.mlx:MlxEngine", "adapters that `loraover export mlx` writes"),
    "openvino": EngineEntry("OpenVINO GenAI", f"{_HERE}.openvino:OpenVinoEngine", _UNIFORM),
    "torch": EngineEntry("PyTorch with PEFT", f"{_HERE}.torch:TorchEngine", "PEFT's adapters", is_timed=True),
}
"""Engines that can be started here, by the name that `--engine` takes."""

ENDPOINT = "endpoint"
"""Name of the engine that is a server which already runs, chosen by `--endpoint`."""


def engine_class(name: str) -> type[Engine]:
    """Import the class of an engine, given one of `ENGINES` or `ENDPOINT`."""
    found: type[Engine] = imported(f"{_HERE}.endpoint:EndpointEngine" if name == ENDPOINT else ENGINES[name].place)
    return found


@dataclass(frozen=True, kw_only=True)
class EngineRequest(ServerRequest, ABC):
    """Arguments that verify and parity share."""

    graph: AnyPath | None = option(
        "Folder of an earlier swappable ONNX export, whose graph ONNX Runtime runs with the adapters; `verify "
        "--reference` takes any graph of vectors, classes or scores.",
        default=None,
        default_text="graphs that are built for the run",
    )
    timeout_s: float = option(
        "Seconds to wait for a server's answer before giving up on the server.",
        default=120.0,
        flag="--timeout",
        least=1,
        most=TIMEOUT_MAX,
    )

    @property
    @abstractmethod
    def asked(self) -> tuple[str, ...]:
        """Names of the engines, of those in `ENGINES` and `ENDPOINT`."""

    def faults(self) -> Iterator[str]:
        for name, engine in ENGINES.items():
            given = self.given(*(field for field in engine.options if field in declarations(type(self))))
            if given and name not in self.asked:
                yield f"{given}: for {engine.title} only; add {self.named('engines', name)}."
        yield from super().faults()
