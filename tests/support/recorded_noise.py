"""What real engines answered, as `benchmarks.verify_noise` recorded it, and what the rules of verify make of it."""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loraover_serve.judge.case import allowed_strength
from loraover_serve.judge.limits import (
    AS_BASE,
    CERTAIN,
    CLEAR,
    EXACT,
    EXCESS,
    FEW_AS_BASE,
    FLOOR,
    NUMBER_FORMATS,
    ROUNDED_STRENGTH,
    SEEN,
)

from oracles.prompt_estimates import Estimate, Projections, log_ratios, strength

NOISE = Path(__file__).parents[1] / "serve" / "noise"
SERVED = NOISE / "served"
FAMILIES = NOISE / "families"
ADAPTERS = ("adapter", "weak", "strong")
"""Arms whose difference from PyTorch's adapter was recorded; that of the others is from PyTorch's base model."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Verdicts:
    """What the rules say of drawn sets of prompts, each an array of one truth value for each set.

    Args:
        differs: Whether a rule finds a fault.
        narrow: Whether the interval of the strength is narrow enough for "as trained".
    """

    differs: NDArray[np.bool_]
    narrow: NDArray[np.bool_]


@dataclass(frozen=True)
class Limits:
    """Limits of the rules, which are those of verify unless others are tried.

    Args:
        excess: As `EXCESS`.
        certain: As `CERTAIN`.
        deviation: As `ROUNDED_STRENGTH`.
        nearer: As `EXCESS`, of the base model's distance to the adapter's.
    """

    excess: float = EXCESS
    certain: float = CERTAIN
    deviation: float = ROUNDED_STRENGTH
    nearer: float = EXCESS


IN_USE = Limits()


@dataclass(frozen=True)
class DrawnSets:
    """Measurements of drawn sets of prompts, each an array of one number for each set.

    Args:
        engine: The engine.
        strength: Strength of what is served.
        excess: Logarithm of the excess that is certain.
        nearer: Logarithm of the ratio of the base model's distance to the adapter's that is certain.
        far: Multiple of the noise that FEW_AS_BASE prompts exceed.
        is_split: Whether some answers are the base model's, and others not.
        is_of_base: Whether the base model's noise looks like a fault.
    """

    engine: Recorded
    strength: Estimate
    excess: Floats
    nearer: Floats
    far: Floats
    is_split: NDArray[np.bool_]
    is_of_base: NDArray[np.bool_]

    @property
    def deviation(self) -> Floats:
        """How far the strength is certainly outside of twice what PyTorch shows."""
        low, high = self.engine.allowed_by(Limits(deviation=0.0))
        beyond: Floats = np.maximum(self.strength.low - high, low - self.strength.high)
        return beyond

    def by(self, limits: Limits) -> Verdicts:
        """The verdicts by limits."""
        low, high = self.engine.allowed_by(limits)
        differs = (
            (self.strength.low > high)
            | (self.strength.high < low)
            | (self.excess > math.log(limits.excess))
            | (self.nearer > math.log(limits.nearer))
            | (self.far > limits.certain)
            | self.is_split
            | self.is_of_base
        )
        return Verdicts(differs, self.strength.half + (high - low) / 2 < SEEN)


class Recorded:
    """The recorded answers of one engine.

    Args:
        path: The file.
        adapter: Place of one of several adapters in the file; None: it has one.
    """

    def __init__(self, path: Path, adapter: int | None = None) -> None:
        self.name = path.stem
        with np.load(path) as file:
            given = {name: file[name] if adapter is None else file[name][adapter] for name in file.files}
        self._kept = {name: np.nan_to_num(each.astype(np.float64)) for name, each in given.items() if each.ndim}
        self.number_format, self.bias = str(given["number_format"]), float(given["bias"])
        self.sensitivity = float(given["sensitivity"])

    @classmethod
    def all(cls) -> list[Recorded]:
        """Every engine's."""
        return [cls(path) for path in sorted(NOISE.glob("*.npz"))]

    @classmethod
    def on_served_weights(cls) -> list[Recorded]:
        """Those whose reference has the weights that the engine has."""
        return [cls(path) for path in sorted(SERVED.glob("*.npz"))]

    @classmethod
    def of_families(cls) -> dict[tuple[str, str], list[Recorded]]:
        """Those of many adapters, by the family of their model and the engine."""
        found = {}
        for path in sorted(FAMILIES.glob("*.npz")):
            family, _, engine = path.stem.partition("-")
            with np.load(path) as file:
                number = len(file["bias"])
            found[family, engine] = [cls(path, adapter) for adapter in range(number)]
        return found

    def cut(self, positions: int, top: int) -> Recorded:
        """The engine with fewer positions of each prompt, and with fewer logprobs at each of them.

        Args:
            positions: Number of positions.
            top: Number of logprobs that the engine gives: tokens count that are so likely in both of its arms.
        """
        base = self._kept["likely"] + self._kept["base"]
        adapter = self._kept["likely"] + self.effect + self._kept["adapter"]
        shown = (_rank(base) < top) & (_rank(adapter) < top)
        return self._with({name: (each * shown)[:, :positions] for name, each in self._kept.items()}, self.bias)

    def served(self, ratio: float, factor: float) -> Recorded:
        """The engine with a stronger or weaker adapter, and with a fault of its scaling.

        Args:
            ratio: RMS effect of the adapter, as a multiple of the base model's noise. The noise stays as it is.
            factor: Factor on what the engine's adapter changes.
        """
        scale = ratio * _rms_of(self._kept["base"]) / _rms_of(self.effect)
        effect = scale * self.effect
        kept = {name: self._kept[name] for name in ("likely", "base")}
        adapter = self._kept["adapter"] + (factor - 1) * effect
        return self._with(kept | {"effect": effect, "adapter": adapter}, 1 + (self.bias - 1) / scale)

    def without_chance(self) -> Recorded:
        """The engine with a strength of 1, if the interval of its own holds 1, so that its deviation is chance."""
        found = self.strength("adapter")
        if abs(float(found.value) - 1) > float(found.half):
            return self
        adapter = self._kept["adapter"] + (1 - float(found.value)) * self.effect
        return self._with(self._kept | {"adapter": adapter}, self.bias)

    def partly(self, prompts: int, factor: float) -> Recorded:
        """The engine with a fault of its scaling on the first prompts alone."""
        wrong = np.arange(len(self.effect))[:, None, None] < prompts
        adapter = self._kept["adapter"] + wrong * (factor - 1) * self.effect
        return self._with(self._kept | {"adapter": adapter}, self.bias)

    def beside_another(self) -> Recorded:
        """The engine with another adapter of the same size: its change of each prompt is that of the prompt before."""
        adapter = self._kept["adapter"] + np.roll(self.effect, 1, axis=0) - self.effect
        return self._with(self._kept | {"adapter": adapter}, self.bias)

    def _with(self, kept: dict[str, Floats], bias: float) -> Recorded:
        found = copy(self)
        found._kept, found.bias = kept, bias
        return found

    @property
    def allowed(self) -> tuple[float, float]:
        """Strengths that a right adapter has."""
        return self.allowed_by(Limits())

    def allowed_by(self, limits: Limits) -> tuple[float, float]:
        """Strengths that a right adapter has by other limits."""
        low, high = allowed_strength(self.number_format, self.bias)
        more = 0.0 if self.number_format == NUMBER_FORMATS[0] else limits.deviation - ROUNDED_STRENGTH
        return low - more, high + more

    @property
    def effect(self) -> Floats:
        """What the adapter changes in PyTorch."""
        effect: Floats = self._kept["effect"]
        return effect

    @property
    def base_off(self) -> Floats:
        """How far the base model's answers are from PyTorch's."""
        off: Floats = self._kept["base"]
        return off

    @property
    def likely(self) -> Floats:
        """PyTorch's logprobs of the base model; 0 where no token was kept."""
        likely: Floats = self._kept["likely"]
        return likely

    def change(self, arm: str) -> Floats:
        """What the engine's answers to an arm change in those of its base model."""
        found: Floats = self.off(arm) + self.effect - self._kept["base"]
        return found

    def off(self, arm: str) -> Floats:
        """How far the answers to an arm are from those of PyTorch's adapter."""
        found: Floats = self._kept[arm] - (0 if arm in ADAPTERS else self.effect)
        return found

    def noise(self, arm: str) -> float:
        """RMS difference of an arm's answers from PyTorch's, in nats."""
        return float(np.sqrt(np.square(self._kept[arm]).mean()))

    def largest_between(self, one: str, other: str) -> float:
        """The largest RMS difference, in nats, of two arms' answers at one position."""
        return float(np.sqrt(np.square(self._kept[one] - self._kept[other]).mean(-1)).max())

    def strength(self, arm: str) -> Estimate:
        """Strength on all prompts of what is served."""
        return strength(_projections(self.change(arm), self.effect))

    def excess(self, arm: str) -> Floats:
        """Logarithm of each prompt's excess."""
        there = self.sensitivity * _rms(self._kept["base"]) + FLOOR
        ratios: Floats = np.log(_rms(self.off(arm)) + FLOOR) - np.log(there)
        return ratios

    def multiples(self, arm: str, chosen: NDArray[np.int64]) -> Floats:
        """What most positions of each prompt are off by at least, in multiples of the noise there or of all prompts."""
        off = np.sort(np.sqrt(np.square(self.off(arm)).mean(-1)), axis=-1)
        middle, base = off[:, (off.shape[1] - 1) // 2][chosen], _rms(self._kept["base"])[chosen]
        usual = np.sqrt(np.square(base).mean(-1, keepdims=True))
        found: Floats = (middle + FLOOR) / (self.sensitivity * np.maximum(base, usual) + FLOOR)
        return found

    def judged(
        self,
        arm: str,
        draw: np.random.Generator,
        runs: int,
        prompts: int,
        *,
        repeats: bool = True,
        limits: Limits = IN_USE,
    ) -> Verdicts:
        """Judge drawn sets of prompts."""
        return self.drawn(arm, draw, runs, prompts, repeats=repeats).by(limits)

    def drawn(self, arm: str, draw: np.random.Generator, runs: int, prompts: int, *, repeats: bool = True) -> DrawnSets:
        """Measure drawn sets of prompts.

        The noise of each prompt has a random sign, so that a set is not one of few, and what it has along the effect in
        all prompts, such as rounding's own bias, stays.
        """
        number = len(self._kept["base"])
        if repeats:
            chosen = draw.integers(number, size=(runs, prompts))
        else:
            chosen = draw.permuted(np.tile(np.arange(number), (runs, 1)), axis=1)[:, :prompts]
        signs = draw.choice([-1.0, 1.0], size=(runs, prompts, 1))
        value = float(self.strength(arm).value)
        sums = _projections(self.change(arm) - value * self.effect, self.effect)
        along, size, total = signs * sums.along[chosen], sums.size[chosen], sums.total[chosen]

        def square(factor: float) -> Floats:
            """Square of the drawn change but for a factor of the effect."""
            found: Floats = np.maximum(factor**2 * size + 2 * factor * along + total, 0)
            return found

        to_base, to_adapter, changed = map(np.sqrt, (square(value), square(value - 1), size))
        as_base, clear = _as_base(to_base, to_adapter, changed, self._largest_noise, self._more_noise)
        excess = log_ratios(self.excess(arm)[chosen])
        return DrawnSets(
            engine=self,
            strength=strength(Projections(value * size + along, size, square(value))),
            excess=excess.low,
            nearer=-excess.high - math.log(self.sensitivity),
            far=np.sort(self.multiples(arm, chosen), axis=-1)[:, -FEW_AS_BASE],
            is_split=(as_base >= FEW_AS_BASE) & (as_base <= clear - FEW_AS_BASE),
            is_of_base=self._of_base(signs, chosen),
        )

    @property
    def _largest_noise(self) -> float:
        """Largest change at a position, as the root of its sum of squares, that is taken for the base model's noise."""
        return CLEAR * math.sqrt(2) * (self.noise("base") + FLOOR) * math.sqrt(self.effect.shape[-1])

    @property
    def _more_noise(self) -> float:
        """Noise of the adapter's answers beside that of the base model's, as the root of its sum of squares."""
        return math.sqrt(self.sensitivity**2 - 1) * self.noise("base") * math.sqrt(self.effect.shape[-1])

    def _of_base(self, signs: Floats, chosen: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the base model's noise looks like another temperature, or like the adapter."""
        if self.noise("base") <= EXACT:
            return np.zeros(len(chosen), dtype=bool)
        base, likely = self._kept["base"], self._likely
        centred = (base - base.mean(-1, keepdims=True)) * (np.abs(likely).sum(-1, keepdims=True) > 0)
        found = []
        for noise, way in ((centred, likely), (base, self.effect)):
            sums = _projections(noise, way)
            found.append(_explained(Projections(signs * sums.along[chosen], sums.size[chosen], sums.total[chosen])))
        return found[0] | found[1]

    @property
    def _likely(self) -> Floats:
        kept = self._kept["likely"]
        centred: Floats = kept - kept.mean(-1, keepdims=True)
        return centred


def _rank(logprobs: Floats) -> NDArray[np.int64]:
    """Rank of each recorded token at its position, 0 for the likeliest."""
    known = np.where(logprobs == 0, -np.inf, logprobs)
    return np.argsort(np.argsort(-known, axis=-1), axis=-1)


def _rms_of(values: Floats) -> float:
    return float(np.sqrt(np.square(values).mean()))


def _projections(change: Floats, direction: Floats) -> Projections:
    return Projections((change * direction).sum(-1), np.square(direction).sum(-1), np.square(change).sum(-1))


def _rms(differences: Floats) -> Floats:
    found: Floats = np.sqrt(np.square(differences).mean((-2, -1)))
    return found


def _explained(found: Projections) -> NDArray[np.bool_]:
    """Whether a direction explains half of a change, and its factor is certainly positive."""
    estimate = strength(found)
    part = estimate.value**2 * found.size.sum((-2, -1)) / np.maximum(found.total.sum((-2, -1)), np.finfo(float).tiny)
    explained: NDArray[np.bool_] = (part >= 0.5) & (estimate.low > 0)
    return explained


def _as_base(
    to_base: Floats, to_adapter: Floats, size: Floats, largest: float, more: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of answers that are the base model's, and of those at which that would be seen, in each set."""
    mine = np.median(np.minimum(to_base, to_adapter), axis=(-2, -1), keepdims=True)
    clear = size > CLEAR * np.maximum(mine, more)
    found = clear & (to_base < to_adapter / AS_BASE) & (to_base <= largest)
    return found.sum((-2, -1)), clear.sum((-2, -1))
