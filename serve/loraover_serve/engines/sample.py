"""A request, and the tokens of its answer with the times at which they arrived."""

from __future__ import annotations

from dataclasses import dataclass


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


@dataclass(frozen=True)
class TokenRequest:
    """Prompt to continue.

    Args:
        prompt: Token ids.
        new_tokens: Number of tokens to generate, even beyond an end of text.
    """

    prompt: tuple[int, ...]
    new_tokens: int
