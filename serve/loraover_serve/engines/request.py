"""Arguments of the verbs that start engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from threading import TIMEOUT_MAX

from loraover.common.request import AnyPath, declarations, option
from loraover_serve.engines import ENGINES
from loraover_serve.vllm.request import ServerRequest


@dataclass(frozen=True, kw_only=True)
class EngineRequest(ServerRequest, ABC):
    """Arguments that verify and parity share."""

    graph: AnyPath | None = option(
        "Folder of an earlier swappable ONNX export, whose graph ONNX Runtime runs with the adapters.",
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
