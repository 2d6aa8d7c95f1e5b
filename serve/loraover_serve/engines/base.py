"""The interface of an engine that the parity run measures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from loraover.common.errors import EngineError, LoraOverError
from loraover_serve.engines.sample import Request, Sample


class Engine(ABC):
    """A running engine with all arms loaded; an arm is one of the adapters that are compared, or the base model."""

    name: str
    arms: tuple[str, ...]

    @abstractmethod
    def run(self, arm: str, block: int, first: int, requests: Sequence[Request]) -> list[Sample]:
        """Answer requests at the same time, greedily and with exactly `new_tokens` tokens each.

        Args:
            arm: name of the arm that answers.
            block: number of the block that the requests belong to, recorded in the samples.
            first: index of the first request, recorded in the samples.
            requests: the prompts and lengths.

        Raises:
            EngineError: a request that failed, or that got no answer in time.
        """


@contextmanager
def engine_errors(engine: str) -> Iterator[None]:
    """Turn the errors of torch, PEFT and onnxruntime-genai into one that names the engine.

    Args:
        engine: name of the engine.

    Raises:
        EngineError: an error within the block.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, OSError) as error:
        if isinstance(error, LoraOverError):
            raise
        raise EngineError(f"{engine}: {type(error).__name__}: {error}") from error
