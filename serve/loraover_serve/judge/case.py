"""Evidence of an engine, with the estimates that the rules ask of it.

Strength is judged over prompts (see `estimates`). On an engine that computes exactly, a few prompts are enough. A
change is a difference of two answers. If the noise of each is at most CERTAIN times the base model's, their squares sum
up to

    2 * (CERTAIN * (noise + FLOOR))**2

at each token, which bounds the error of the strength even if all of that noise lies along the adapter.

Errors at right angles to the adapter do not change the strength. They show as *excess*: the ratio of the adapter's
distance from PyTorch to the base model's, for each prompt, because prompts differ in noise. A few prompts that are far
off hardly change the mean logarithm of this ratio, so they are counted: see `far`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from statistics import fmean, median

from loraover_serve.judge.estimates import Fit, Interval, fit_strength, log_ratio, t_quantile
from loraover_serve.judge.evidence import (
    Change,
    ComparedAnswer,
    Evidence,
    Repeat,
    by_prompt,
    middle_by_prompt,
)
from loraover_serve.judge.limits import (
    ADAPTER,
    AS_BASE,
    BASE,
    BY_CHANCE,
    CERTAIN,
    CLEAR,
    COARSER,
    EXACT,
    EXACT_STRENGTH,
    EXCESS,
    EXPLAINED,
    FEW_AS_BASE,
    FEW_PROMPTS,
    FLOOR,
    NUMBER_FORMATS,
    PLAIN,
    ROUNDED_STRENGTH,
    SURE,
)
from loraover_serve.judge.models import Model
from loraover_serve.judge.results import GreedyAgreement, LogprobDistance, Off


def flag(field: str) -> str:
    """An option as a command line has it, without the unit of its field."""
    return f"--{field.removesuffix('_s').replace('_', '-')}"


class Case:
    """Evidence of an engine, with the estimates that the rules ask of it.

    Args:
        served_format: Coarsest number format in which the base model is known to be served.
        option: Name of an option as its user writes it.

    Attributes:
        is_one_model: Whether the engine has one model under both names, so that it has no base model's answers.
        changes: Changes by the engine's adapter, projected on those by the right adapter in PyTorch.
        off: Differences of the adapter's answers from those of the right adapter.
        found: Distance of the adapter's answers.
        noise: Distance of the base model's answers; `found` takes its place on an engine with one model.
        effect: RMS change of logprobs by the adapter, in nats.
    """

    def __init__(self, evidence: Evidence, served_format: str = "bf16", option: Callable[[str], str] = flag) -> None:
        self.evidence, self.served_format, self.option = evidence, served_format, option
        self.changes = evidence.changes(evidence.adapter, evidence.base)
        self.off = evidence.off(ADAPTER, evidence.adapter)
        self.found = LogprobDistance.of(self.off)
        self.is_one_model = evidence.answers.is_one_model
        self.noise = self.found if self.is_one_model else LogprobDistance.of(evidence.off(BASE, evidence.base))
        self.effect = math.sqrt(fmean(each.size / each.tokens for each in self.changes))
        self._roundings: dict[str, float] = {}

    @cached_property
    def strength(self) -> Interval:
        """Strength of the adapter in the engine's changes."""
        return fit_along(self.changes).within(most_noise(self.changes, self.noise.rms))

    @property
    def has_other_weights(self) -> bool:
        """Whether a base model far off may have other weights than the reference, which holds quantised ones alone."""
        is_read_alike = all(each.is_same for each in self.evidence.answers.chats or ())
        return self.evidence.models.finest not in (None, *PLAIN) and is_read_alike and not self.is_one_model

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return len({each.prompt for each in self.changes})

    def first(self, number: int) -> int:
        """Number of prompts to run, so that they include the first `number` that the engine answered."""
        return sorted({each.prompt for each in self.changes})[:number][-1] + 1

    @cached_property
    def number_format(self) -> str | None:
        """The finest number format whose rounding explains the base model's noise; None if none does."""
        return self.format_of(self.noise.rms)

    def format_of(self, noise: float) -> str | None:
        """The finest number format whose rounding explains a noise in nats; None if none does."""
        if noise <= EXACT:
            return NUMBER_FORMATS[0]
        return next((name for name in NUMBER_FORMATS[1:] if noise <= COARSER * self._rounding(name)), None)

    def _rounding(self, name: str) -> float:
        if name not in self._roundings:
            self._roundings[name] = self.evidence.models.rounding(name)
        return self._roundings[name]

    def bias_in(self, name: str | None) -> float:
        """Strength of the right adapter if PyTorch computes in a number format; None stands for an unknown one."""
        return self.evidence.models.bias("bf16" if name in (None, *PLAIN) else str(name)) or 1.0

    @cached_property
    def allowed(self) -> tuple[float, float]:
        """Interval of the strengths that a right adapter can have.

        A single model shows its number format by the adapter's answers, which rounding may move further than the base
        model's. So it may also have a finer format, down to the declared one.
        """
        found, finer = self.number_format, tuple[str, ...]()
        if self.is_one_model and found is not None:
            finer = NUMBER_FORMATS[NUMBER_FORMATS.index(self.served_format) : NUMBER_FORMATS.index(found)]
        lows, highs = zip(*(allowed_strength(name, self.bias_in(name)) for name in (found, *finer)), strict=True)
        return min(lows), max(highs)

    @cached_property
    def sensitivity(self) -> float:
        """Ratio by which rounding moves the adapted model further, in any number format that the engine may hold."""
        known = (self.number_format or NUMBER_FORMATS[0], self.served_format)
        found, served = map(NUMBER_FORMATS.index, known)
        return self.evidence.models.sensitivity_in(NUMBER_FORMATS[max(1, found) : max(found, served) + 1])

    @property
    def limit(self) -> float:
        """Largest distance of a single computation that noise explains, in nats."""
        return allowed_distance(self.noise, self.sensitivity)

    @cached_property
    def excess(self) -> Interval:
        """Logarithm of the adapter's distance, divided by the base model's distance times the sensitivity."""
        return self._excess_of(self.off)

    def _excess_of(self, off: Sequence[Off]) -> Interval:
        there = self._noise_by_prompt
        pairs = [(mine, there[prompt]) for prompt, mine in sorted(by_prompt(off).items()) if prompt in there]
        noise = [self.sensitivity * base + FLOOR for _, base in pairs]
        return log_ratio([mine + FLOOR for mine, _ in pairs], noise)

    @property
    def times_off(self) -> float:
        """Ratio of the adapter's distance to what noise explains, by the measure that `is_further` judges."""
        if self.found.prompts >= FEW_PROMPTS and not self.is_one_model:
            return math.exp(self.excess.value)
        return self.found.rms / (self.sensitivity * self.noise.rms + FLOOR)

    @cached_property
    def _noise_by_prompt(self) -> dict[int, float]:
        return by_prompt(() if self.is_one_model else self.evidence.off(BASE, self.evidence.base))

    @cached_property
    def _explained(self) -> dict[int, float]:
        """Distance that noise explains at each prompt: the base model's there or over all, whichever is larger.

        That of a prompt alone is large where rounding sends a token to another expert, and small by chance where an
        answer has few numbers.
        """
        usual, times = self.noise.rms, self.sensitivity
        return {prompt: times * max(mine, usual) + FLOOR for prompt, mine in self._noise_by_prompt.items()}

    def far(self, off: Sequence[Off]) -> list[int]:
        """Prompts whose answers are CERTAIN times as far off as noise explains, at more than half of their positions.

        Args:
            off: Differences of the answers.
        """
        limits = {prompt: CERTAIN * noise - FLOOR for prompt, noise in self._explained.items()}
        found = middle_by_prompt(off).items()
        return sorted(prompt for prompt, mine in found if mine > limits.get(prompt, math.inf))

    @cached_property
    def cache_share(self) -> float:
        """Share of the base model's distance that a KV cache in float8 explains; 0 if it cannot be told apart.

        Such a cache is not a fault. If the rest of the distance is small, the weights are the base model's.
        """
        if self.number_format in PLAIN or self.is_one_model:
            return 0.0
        found = max(map(self.share_of, self.evidence.models.with_coarse_caches()), default=0.0)
        return found if found >= EXPLAINED else 0.0

    @property
    def weights_format(self) -> str | None:
        """The finest number format that explains the part of the noise which the KV cache does not."""
        return self.format_of(self.noise.rms * math.sqrt(1 - self.cache_share))

    def share_of(self, model: Model) -> float:
        """Share of the error of the engine's base model that a changed base model explains."""
        changes = self.evidence.base_changes(model)
        found = strength_along(changes)
        return share_along(changes, found) if found.value > EXPLAINED else 0.0

    @cached_property
    def repeats(self) -> Sequence[Repeat]:
        """All answers of the adapter to questions that were asked several times."""
        return self.evidence.repeats

    @property
    def answers(self) -> Sequence[Change]:
        """Return the change by each answer of the adapter, also by repeated answers to one question."""
        return [each.change for each in self.repeats] or self.changes

    @cached_property
    def as_base(self) -> tuple[list[Change], list[Change]]:
        """Answers of the adapter that are the base model's, and the others for which this could be seen."""
        limit = CLEAR * math.sqrt(2) * (self.noise.rms + FLOOR)
        more = 0.0 if self.is_one_model else math.sqrt(self.sensitivity**2 - 1) * self.noise.rms
        return split_base(self.answers, limit, noise=more)

    @cached_property
    def generated(self) -> list[ComparedAnswer]:
        """The adapter's greedy answers."""
        return self.evidence.generated()

    @cached_property
    def greedy(self) -> GreedyAgreement | None:
        """Greedy answers beside PyTorch's; None if the engine identifies no tokens."""
        allowed = 2 * self.sensitivity * self.noise.largest + FLOOR
        known = [each for each in self.generated if each.tokens]
        if not known:
            return None
        alike = [each for each in known if each.parted is None]
        equal = sum(each.is_complete(self.evidence.models.ends) for each in alike)
        return GreedyAgreement(
            equal=equal / len(known),
            early=(len(alike) - equal) / len(known),
            gap=max(each.gap for each in known),
            allowed=allowed,
            as_base=sum(each.is_base and each.gap > allowed for each in known),
        )

    @cached_property
    def mixed(self) -> dict[str, LogprobDistance]:
        """Distances between answers that were sent together and alone."""
        return {name: LogprobDistance.of(off) for name, off in self.evidence.mixed.items() if off}

    def is_further(self, off: Sequence[Off] | None = None) -> bool:
        """Whether answers are further off than the base model's noise explains; with one model, any number format.

        Args:
            off: Differences of the answers; None for the right adapter's.
        """
        found = self.found if off is None else LogprobDistance.of(off)
        if self.is_one_model:
            return self.format_of(found.rms) is None
        if found.prompts < FEW_PROMPTS:
            return found.rms > CERTAIN * (self.sensitivity * self.noise.rms + FLOOR)
        return (self.excess if off is None else self._excess_of(off)).low > math.log(EXCESS)

    def is_apart(self, arm: str) -> bool:
        """Whether a model's answers that were sent together are further from those sent alone than noise explains.

        Both answers have the engine's noise, so half of the square is taken. Noise is at least what the adapter's
        answers alone, which earlier rules found right, are off by. In the mean, each prompt counts at least as much as
        noise, so that prompts with identical answers do not hide the others.

        Args:
            arm: Name of the model.
        """
        halved = [each._replace(square=each.square / 2) for each in self.evidence.mixed[arm]]
        found = LogprobDistance.of(halved)
        if self.is_one_model or found.prompts < FEW_PROMPTS:
            return found.rms > self.limit
        distances, alone = by_prompt(halved), self.found.rms + FLOOR if arm == ADAPTER else FLOOR
        noise = {prompt: max(one, alone) for prompt, one in self._explained.items() if prompt in distances}
        excess = log_ratio([max(distances[at] + FLOOR, one) for at, one in noise.items()], [*noise.values()])
        return len(self.far(halved)) >= FEW_AS_BASE or excess.low > math.log(EXCESS)

    def is_nearer(self) -> bool:
        """Whether the base model's answers are further off than the adapter's noise explains."""
        return self.prompts >= FEW_PROMPTS and self.excess.high < -math.log(EXCESS * self.sensitivity)


def fit_along(changes: Sequence[Change]) -> Fit:
    """Factor on the directions that fits the changes best, with the numbers that bound its error."""
    return fit_strength([(each.prompt, each.along, each.size) for each in changes])


def strength_along(changes: Sequence[Change]) -> Interval:
    """Factor on the directions that fits the changes best, with its interval."""
    return fit_along(changes).interval


def most_noise(changes: Sequence[Change], noise: float) -> float:
    """Largest Euclidean norm of the noise in changes, in nats, from the RMS noise of single answers."""
    return CERTAIN * math.sqrt(2) * (noise + FLOOR) * math.sqrt(sum(each.tokens for each in changes))


def share_along(changes: Sequence[Change], estimate: Interval) -> float:
    """Share of the sum of squared changes that the directions times this factor explain; at most 1."""
    total = math.fsum(each.total for each in changes)
    return min(1.0, estimate.value**2 * math.fsum(each.size for each in changes) / total) if total > 0 else 0.0


def split_base(
    changes: Sequence[Change], limit: float = math.inf, *, noise: float = 0.0
) -> tuple[list[Change], list[Change]]:
    """Split the positions where the adapter's change stands out from noise: those that lack it, and the others.

    Args:
        changes: Changes by the engine's adapter, projected on those by the right adapter in PyTorch.
        limit: Largest RMS change, in nats, that is taken for noise. A weaker adapter changes more.
        noise: RMS noise, in nats, that the adapter's answers have beside that of the base model's.
    """
    if not changes:
        return [], []
    least = CLEAR * median(min(math.sqrt(each.total), math.sqrt(each.rest)) for each in changes)
    found: tuple[list[Change], list[Change]] = ([], [])
    for each in changes:
        if math.sqrt(each.size) > max(least, CLEAR * noise * math.sqrt(each.tokens)):
            is_nearer = math.sqrt(each.total) < math.sqrt(each.rest) / AS_BASE
            found[not (is_nearer and each.total <= limit**2 * each.tokens)].append(each)
    return found


def allowed_strength(number_format: str | None, bias: float) -> tuple[float, float]:
    """Interval of the strengths that a right adapter can have on an engine.

    Rounding shrinks an adapter's changes. An engine may shrink them more than PyTorch does in the same number format,
    so twice PyTorch's deviation is allowed.

    Args:
        number_format: Number format of the base model; None if it is unknown.
        bias: Strength of the adapter if PyTorch computes in that number format.
    """
    if number_format == NUMBER_FORMATS[0]:
        return 1 - EXACT_STRENGTH, 1 + EXACT_STRENGTH
    low, high = (2 * min(bias, 1.0) - 1, 2 * max(bias, 1.0) - 1)
    return low - ROUNDED_STRENGTH, high + ROUNDED_STRENGTH


def allowed_distance(noise: LogprobDistance, sensitivity: float) -> float:
    """Largest distance, in nats, that the noise explains; noise and distance are both estimated over prompts."""
    relative = noise.error / noise.rms if noise.rms else 0.0
    return sensitivity * noise.rms * (1 + sure_errors(noise.prompts) * math.sqrt(2) * relative) + FLOOR


def sure_errors(prompts: int) -> float:
    """Number of standard errors by which an estimate may be off, if they are estimated from so many prompts.

    Two prompts have one degree of freedom; a single one is treated like two.
    """
    return max(SURE, t_quantile(max(prompts - 1, 1), BY_CHANCE))
