"""The interface of an engine, which verify asks for logprobs, and parity for answers with their times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from loraover.common.errors import EngineError, LoraOverError
from loraover.common.extras import install
from loraover.models.load import ModelSource
from loraover_serve.engines import EngineRequest
from loraover_serve.engines.answers import kept_rows
from loraover_serve.engines.installed import installed_version
from loraover_serve.judge.limits import ADAPTER, BASE
from loraover_serve.judge.models import Answers, Greedy, Models, Rows

Watch = Callable[[int], AbstractContextManager[Any]]
"""Returns a context manager that runs as long as the process with the given id."""


@dataclass(frozen=True)
class RunningServer:
    """A server that somebody else has started.

    Args:
        url: Its address.
        adapter: Name by which it serves the adapter.
        base: Name by which it serves the base model; None means the model's own name, or the only other name there.
        key_variable: Environment variable with its key; None sends none.
    """

    url: str
    adapter: str
    base: str | None = None
    key_variable: str | None = None


@dataclass(frozen=True)
class Setting:
    """Settings with which an engine is started.

    Args:
        adapters: Folder of each arm's adapter or checkpoint, by the arm's name. The base model is one more arm.
        scratch: Folder for exports, empty at first.
        log: File for what the engine prints.
        longest: Number of tokens of the longest request with its answer.
        device: Device that PyTorch runs on.
        compute_dtype: Data type that PyTorch runs in.
        checkpoint: Folder of a checkpoint whose unfolded model is an arm, if the engine has one; None for no such arm.
        copies: Names of the arms that are copies of other arms, with the names of those.
        base_gguf: GGUF file of the base model; None has one written.
        server: Server that already runs, for the engine `endpoint`.
        watch: Context manager that runs as long as a server; it is called with the id of the server's process.
    """

    request: EngineRequest
    adapters: Mapping[str, Path]
    base: ModelSource
    scratch: Path
    log: Path
    longest: int
    device: str = "cpu"
    compute_dtype: str = "fp32"
    checkpoint: Path | None = None
    copies: Mapping[str, str] = field(default_factory=dict)
    base_gguf: Path | None = None
    server: RunningServer | None = None
    watch: Watch = nullcontext

    @property
    def adapter(self) -> Path:
        """Folder of the adapter that is verified."""
        return self.adapters[ADAPTER]


class Engine(ABC):
    """A running engine with all arms loaded; an arm is one of the adapters, or the base model."""

    name: str
    """Name that `--engine` takes."""

    distributions: ClassVar[tuple[str, ...]] = ()
    """The engine's distributions on PyPI, the usual one first."""

    needs: ClassVar[tuple[str, ...]] = ()
    """Further PyPI distributions that the engine needs to be started here."""

    reported: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Packages whose versions a report has, each with its distributions."""

    hint: ClassVar[str] = install("serve")
    """Instructions to install the engine."""

    @classmethod
    def installed(cls) -> str | None:
        """Version that is installed; None if it is missing."""
        return installed_version(cls.distributions)

    @classmethod
    def lacking(cls, request: EngineRequest) -> str | None:
        """Return how to install what the engine lacks here, in words; None if it can be started."""
        is_here = cls.installed() is not None and all(installed_version([name]) is not None for name in cls.needs)
        return None if is_here else cls.hint

    @classmethod
    def check(cls, setting: Setting) -> None:
        """Refuse a request that the engine cannot carry out, before any model is loaded.

        Raises:
            LoraOverError: What is wrong with it.
        """
        return

    @classmethod
    @abstractmethod
    def start(cls, setting: Setting) -> AbstractContextManager[Engine]:
        """Export the adapter in the form that the engine takes, start it, and stop it after the block.

        Raises:
            EngineError: An engine that does not start.
            ExportError: An adapter that cannot be exported for it.
        """

    def version(self) -> str | None:
        """Version that runs; None if the engine reports none.

        Raises:
            EngineError: A server that does not answer.
        """
        return self.installed()

    def program(self, name: str) -> tuple[str, str] | None:
        """Engine that answers, by the name that `--engine` takes, and its version; None if they are not known.

        Args:
            name: Name by which this engine was asked for.
        """
        version = self.version()
        return None if version is None else (name, version)

    @abstractmethod
    def logprobs(self, arm: str, models: Models) -> Rows:
        """Return the arm's logprobs of next tokens at places, of tokens that the models have, or of the likeliest.

        Args:
            models: The questions, with the models that the engine is compared with.

        Raises:
            EngineError: A request that failed.
        """

    @abstractmethod
    def generate(self, arm: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[tuple[int, ...]]:
        """Return the arm's greedy answer to each prompt; the engine may end an answer early or hide its ids.

        Args:
            prompts: Token ids.
            tokens: Number of tokens to generate.

        Raises:
            EngineError: A request that failed.
        """

    def answers(self, models: Models, *, without_mixed: bool = False) -> Answers:
        """Ask everything that the judge needs; the base model first.

        Args:
            models: The questions, with the models that the engine is compared with.
            without_mixed: Whether no requests for both models are sent together.

        Raises:
            EngineError: A request that failed, other than one of those that are sent together.
        """
        base, adapter = (self.logprobs(arm, models) for arm in (BASE, ADAPTER))
        longest = max(len(question.answer) for question in models.questions)
        found = enumerate(self.generate(ADAPTER, [question.prompt for question in models.questions], longest))
        greedy = [Greedy(index, answer, len(answer), {}) for index, answer in found]
        return Answers(base, adapter, greedy, without_mixed=without_mixed)


class LogitEngine(Engine):
    """An engine that gives the logits of the entire vocabulary."""

    @abstractmethod
    def logits(self, arm: str, sequences: Iterable[Sequence[int]]) -> Iterator[Any]:
        """Yield the logits after each token of each sequence, an array of shape (tokens, vocabulary).

        Raises:
            EngineError: A request that failed.
        """

    def logprobs(self, arm: str, models: Models) -> Rows:
        found = enumerate(self.logits(arm, [question.tokens for question in models.questions]))
        rows = (kept_rows(models, index, logits, self.name) for index, logits in found)
        return {place: row for mine in rows for place, row in mine.items()}


@dataclass(frozen=True)
class TokenRequest:
    """Prompt to continue.

    Args:
        prompt: Token ids.
        new_tokens: Number of tokens to generate, even beyond an end of text.
    """

    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True)
class Sample:
    """Tokens and times of one answer.

    Args:
        arm: Name of the arm that answered.
        block: Number of the block that the request belongs to.
        request: Index of the request.
        start_s: Time when the request was sent, in seconds on a monotonic clock.
        token_s: Time when each piece of the answer arrived, in seconds on the same clock.
        token_ids: The generated tokens.
        logprobs: Log-probabilities of the first tokens, in nats, for as many tokens as the engine returns them (ONNX
            Runtime for one).
    """

    arm: str
    block: int
    request: int
    start_s: float
    token_s: tuple[float, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()

    @property
    def first_token_s(self) -> float:
        """Time to first token (TTFT), in seconds."""
        return self.token_s[0] - self.start_s

    @property
    def end_to_end_s(self) -> float:
        """Time to the last token (end-to-end latency, E2EL), in seconds."""
        return self.token_s[-1] - self.start_s

    @property
    def per_token_s(self) -> float:
        """Time per output token after the first (TPOT), in seconds."""
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_ids) - 1)

    @property
    def between_tokens_s(self) -> list[float]:
        """Seconds between pieces of the answer (inter-token latency, ITL); a piece may hold several tokens."""
        return [later - earlier for earlier, later in zip(self.token_s, self.token_s[1:], strict=False)]


class Timed(ABC):
    """Interface of everything that parity measures."""

    name: str
    arms: tuple[str, ...]

    @abstractmethod
    def run(self, arm: str, block: int, first: int, requests: Sequence[TokenRequest]) -> list[Sample]:
        """Answer requests at the same time, greedily and with exactly `new_tokens` tokens each.

        Args:
            arm: Name of the arm that answers.
            block: Number of the block that the requests belong to, recorded in the samples.
            first: Index of the first request, recorded in the samples.
            requests: The prompts and lengths.

        Raises:
            EngineError: A request that failed, or that got no answer in time.
        """


class TimedEngine(Engine, Timed):
    """An engine that parity can measure."""

    @classmethod
    @abstractmethod
    def start_arms(cls, setting: Setting) -> AbstractContextManager[Sequence[TimedEngine]]:
        """Start the engine in each way to be measured, with the adapters as they are, and stop it after the block.

        Raises:
            ConfigError: Memory that does not suffice; the message says what would fit.
            EngineError: An engine that does not start, or that refuses an adapter.
            ExportError: A model or an adapter that cannot be written in the form that the engine takes.
        """


class BatchingEngine(TimedEngine):
    """An engine that answers several requests at once, such as a server."""

    @abstractmethod
    def run_each(
        self, models: Sequence[str], arm: str, block: int, first: int, requests: Sequence[TokenRequest]
    ) -> list[Sample]:
        """Answer requests as `run` does, each with the model of another arm.

        Args:
            models: Name of the arm whose model answers each request.
            arm: Name that the samples get.
            block: Number of the block.
            first: Index of the first request.
            requests: The prompts and lengths.

        Raises:
            EngineError: A request that failed, or that got no answer in time.
        """

    def run(self, arm: str, block: int, first: int, requests: Sequence[TokenRequest]) -> list[Sample]:
        return self.run_each([arm] * len(requests), arm, block, first, requests)


@contextmanager
def engine_errors(engine: str) -> Iterator[None]:
    """Turn the errors of torch, PEFT and onnxruntime-genai into one that names the engine.

    Raises:
        EngineError: An error within the block.
    """
    try:
        yield
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError, OSError) as error:
        if isinstance(error, LoraOverError):
            raise
        raise EngineError(f"{engine}: {type(error).__name__}: {error}") from error
