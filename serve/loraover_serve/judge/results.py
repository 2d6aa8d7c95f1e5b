"""Results of the judge as verify.json has them: plain dataclasses, which pydantic reads and writes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from loraover_serve.judge.estimates import IN_FILES, Interval, root_mean
from loraover_serve.judge.limits import Verdict


class Off(NamedTuple):
    """Difference of an answer from a model's at a position.

    Args:
        prompt: Index of the prompt.
        square: Mean square of the differences of logprobs.
        largest: Largest difference, in nats.
    """

    prompt: int
    square: float
    largest: float


@dataclass(frozen=True)
class LogprobDistance:
    """Distance of an engine's logprobs from a model's in PyTorch, or from its own."""

    __pydantic_config__ = IN_FILES

    rms: float
    """RMS difference of logprobs, in nats"""
    error: float
    """Standard error of rms over prompts, in nats; with a single prompt rms itself"""
    largest: float
    """Largest difference of a logprob, in nats"""
    positions: int
    """Number of positions at which next tokens were compared"""
    prompts: int
    """Number of prompts to which they belong"""

    @classmethod
    def of(cls, found: Sequence[Off]) -> LogprobDistance:
        """Summarise differences at positions; without any, the distance is 0."""
        sums = defaultdict[int, float](float)
        for each in found:
            sums[each.prompt] += each.square
        if not found:
            return cls(0.0, 0.0, 0.0, 0, 0)
        rms, error = root_mean([each * len(sums) / len(found) for each in sums.values()])
        return cls(rms, error, max(each.largest for each in found), len(found), len(sums))


@dataclass(frozen=True)
class MixedBatch:
    """Answers to requests for both models sent together, compared with answers to one model's requests alone."""

    __pydantic_config__ = IN_FILES

    base: LogprobDistance
    """Distance between the base model's answers sent together and apart"""
    adapter: LogprobDistance
    """Distance between the adapter's answers sent together and apart"""
    other: LogprobDistance | None = None
    """Distance between the adapter's answers sent together with another adapter's requests and apart; None if the
    engine has no other adapter"""

    @property
    def rms(self) -> float:
        """The largest of the distances, in nats."""
        return max(each.rms for each in (self.base, self.adapter, self.other) if each is not None)


@dataclass(frozen=True, kw_only=True)
class GreedyAgreement:
    """Greedy answers of the adapter, compared token by token with PyTorch's."""

    __pydantic_config__ = IN_FILES

    equal: float
    """Share of prompts that both answer with the same tokens"""
    early: float = 0.0
    """Share of prompts whose answers stop before PyTorch's without an end token"""
    gap: float
    """Largest difference of PyTorch's logprobs of the two tokens, in nats, where an answer first differs"""
    allowed: float
    """Largest gap that the engine's noise explains, in nats"""
    as_base: int = 0
    """Number of answers that differ by more than that gap, and whose first differing token is the base model's"""


@dataclass(frozen=True)
class Suspect:
    """Fault as PyTorch computes it, compared with the engine's answers."""

    __pydantic_config__ = IN_FILES

    fault: str
    """Name of the fault"""
    detail: str
    """The fault in words"""
    rms: float
    """RMS difference, in nats, between the changes by the engine's adapter and those by the fault: over all prompts for
    the nearest faults, over the first three for the others"""
    explains: bool
    """Whether the fault explains the engine's answers within noise"""


@dataclass(frozen=True)
class Replicas:
    """Answers of servers behind one address, of which some are wrong."""

    __pydantic_config__ = IN_FILES

    answers: int
    """Number of the adapter's answers at which the fault would be seen"""
    bad: int
    """Number of those that are wrong"""
    told_apart: dict[str, list[str]]
    """Headers by which the servers of the wrong answers are known, with their values; an absent header has none"""
    requests: list[dict[str, str]]
    """Headers and ids of each wrong answer, without those that all answers share"""


@dataclass(frozen=True)
class WarmAnswers:
    """Answers on keys and values that a server has kept, compared with the same model's answers without them."""

    __pydantic_config__ = IN_FILES

    arm: str
    """The model: base, adapter, or other for another adapter"""
    after: str
    """Answers that the server gave before, in words"""
    cached: int | None
    """Number of tokens that the server found in its cache; None if it does not tell"""
    apart: LogprobDistance
    """Distance between the answers and those without the cache"""
    strengths: dict[str, Interval]
    """Strength of each recorded stale cache in the answers: 0 if they are right, 1 if they use this cache"""


@dataclass(frozen=True)
class Reload:
    """Command by which a server loaded a new version of the adapter, after it had read the long questions."""

    __pydantic_config__ = IN_FILES

    command: str
    """The command"""
    seconds: float
    """Seconds that it took"""
    roots: tuple[str | None, str | None]
    """Path of the adapter that the server named before the command and after it; None if it named none"""
    apart: LogprobDistance
    """Distance between the adapter's answers before the command and its answers without the cache after it"""


@dataclass(frozen=True)
class FurtherCheck:
    """Verdict on further answers of a server: on keys and values that it has kept, or in churn."""

    __pydantic_config__ = IN_FILES

    verdict: Verdict
    """Verdict on these answers"""
    reason: str
    """Reason for the verdict, in a sentence"""
    fault: str | None
    """The likely fault; None if there is none"""
    noise: LogprobDistance | None = field(default=None, kw_only=True)
    """Noise: distance of the base model's answers on its own keys and values from those without a cache"""
    not_checked: list[str] = field(default_factory=list, kw_only=True)
    """Things that these answers do not show, in words"""


@dataclass(frozen=True)
class Caches(FurtherCheck):
    """Answers to long questions, on keys and values that a server has kept."""

    hits: int | None = None
    """Number of tokens that came from the cache; None if the server does not tell"""
    warm: list[WarmAnswers] = field(default_factory=list)
    """Answers on kept keys and values, in the order in which they were asked for"""
    reload: Reload | None = None
    """Command before which the questions were asked; None if none was given"""

    @property
    def farthest(self) -> float:
        """Largest distance of answers on kept keys and values from those without them, in nats; 0 without any."""
        return max((each.apart.rms for each in self.warm), default=0.0)


@dataclass(frozen=True)
class ChurnAnswers:
    """Answers of one model while adapters came and went."""

    __pydantic_config__ = IN_FILES

    model: str
    """Name of the model on the server"""
    answers: int
    """Number of answers that were compared"""
    owners: dict[str, int]
    """Number of answers of each model, by the model in words"""
    wrong: int
    """Number of answers of another model, of a stale cache, or of no known weights"""
    share: Interval
    """Share of the wrong answers, with an interval that misses the truth in one case of 100 at most"""
    visible: dict[str, float]
    """Smallest share of each kind of wrong answers that is seen with a probability of 99 %; 1 if no share is"""
    absent: int
    """Number of requests that the server refused, since the model was not loaded"""
    latency_s: tuple[float, float] | None
    """Median and 99th percentile of the seconds that an answer took; None without an answer"""


@dataclass(frozen=True)
class Churn(FurtherCheck):
    """Answers while adapters came and went, each attributed to the model that gave it."""

    seconds: float
    """Seconds for which the server was asked"""
    command: str | None
    """Command that ran meanwhile; None if none was given"""
    clients: int
    """Number of requests at a time"""
    failed: int = 0
    """Number of requests that failed"""
    models: list[ChurnAnswers] = field(default_factory=list)
    """Answers of each model"""


def listed(things: Sequence[str], title: str = "not checked") -> list[str]:
    """Lines of a list that stands below a verdict; none if the list is empty.

    Args:
        things: Lines of the list.
        title: Words above it.
    """
    return [f"{title}:", *(f"- {each}" for each in things)] if things else []
