"""What the benchmark asks of an engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from loraover.common.errors import EngineError, LoraOverError
from loraover_serve.engines.sample import Request, Sample


class Engine(ABC):
    """A running engine with all arms loaded."""

    name: str
    arms: tuple[str, ...]

    @abstractmethod
    def run(self, arm: str, block: int, first: int, requests: Sequence[Request]) -> list[Sample]:
        """Answer some requests at the same time, greedily and without an early end.

        Args:
            first: index of the first of them.

        Raises:
            EngineError: a request that failed, or hung.
        """


@contextmanager
def engine_errors(engine: str) -> Iterator[None]:
    """Name the engine in what it raises: the engines of this process have no errors of their own.

    Raises:
        EngineError: for the errors that torch, PEFT and onnxruntime-genai raise.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, OSError) as error:
        if isinstance(error, LoraOverError):
            raise
        raise EngineError(f"{engine}: {type(error).__name__}: {error}") from error
