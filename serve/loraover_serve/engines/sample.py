"""A request, and the times and tokens of its answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """A completion's clock.

    Args:
        arm: who answered.
        block: of the design.
        request: its index.
        start_s: seconds on a clock that only moves forward.
        token_s: when each piece of the answer arrived.
        token_ids: generated.
        logprobs: nats, of as many of the first tokens as the engine tells: ONNX Runtime of one.
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
        """Time to first token (TTFT)."""
        return self.token_s[0] - self.start_s

    @property
    def end_to_end_s(self) -> float:
        """Time to the last token (E2EL)."""
        return self.token_s[-1] - self.start_s

    @property
    def per_token_s(self) -> float:
        """Time per output token after the first (TPOT)."""
        return (self.token_s[-1] - self.token_s[0]) / (len(self.token_ids) - 1)

    @property
    def between_tokens_s(self) -> list[float]:
        """Inter-token latencies (ITL), which a server may deliver several at a time."""
        return [later - earlier for earlier, later in zip(self.token_s, self.token_s[1:], strict=False)]


@dataclass(frozen=True)
class Request:
    """One completion.

    Args:
        prompt: token ids.
        new_tokens: to generate, whatever the text.
    """

    prompt: tuple[int, ...]
    new_tokens: int
