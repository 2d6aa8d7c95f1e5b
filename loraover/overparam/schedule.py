"""Schedules: which sites get cores, and when."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from loraover.common.errors import ConfigError
from loraover.overparam.config import Budget, LoraOverConfig
from loraover.overparam.decompositions import Decomposition
from loraover.overparam.importance import SCORES, GradientScore
from loraover.overparam.probe import Probe, in_mode, undisturbed
from loraover.overparam.round import Round
from loraover.overparam.sharding import full, gathered, of_rank_zero
from loraover.overparam.sites import Site, match_sites, write_matrices

logger = logging.getLogger("loraover")

CALIBRATION_RATE = 1e-3  # learning rate of the warm-up steps that a static schedule takes and undoes


class Schedule:
    """Choice of sites over a run, as its configuration asks for.

    Args:
        config: Configuration of the run.
        sites: All sites of the model, by name.
        steps: Number of optimizer steps of the run. A dynamic schedule needs it.
        probe: Batches for a score that runs the model, and for a static schedule's calibration.

    Attributes:
        candidates: Sites that the configuration's patterns match, by name.
        rounds: Decisions made so far.

    Raises:
        ConfigError: A pattern matches nothing, no choice fits the budget, or a round lies outside the run.
    """

    def __init__(
        self, config: LoraOverConfig, sites: Mapping[str, Site], *, steps: int | None, probe: Probe | None
    ) -> None:
        self.config = config
        self._sites = sites
        self.candidates = {name: sites[name] for name in match_sites(list(sites), config.sites)}
        self.rounds: list[Round] = []
        self.round_steps: list[int] = []
        self.probe = probe
        self._waits = False
        self._decomposition: Decomposition = config.make_decomposition()
        self._added = {
            name: self._decomposition.of_site(name).num_parameters(*site.shape) - site.size
            for name, site in self.candidates.items()
        }
        self.score = SCORES[config.score](self.candidates, config.seed or 0)
        if config.budget is not None:
            self._capacity = self._check_budget(config.budget)
        if config.schedule == "dynamic" and steps is not None:
            self.round_steps = _round_steps(config, steps)

    @property
    def most_parameters(self) -> tuple[int, int]:
        """Largest possible number of parameters of all cores, and of those beyond their matrices' parameters."""
        added = sorted(self._added.values(), reverse=True)
        cores = sorted((self._added[n] + s.size for n, s in self.candidates.items()), reverse=True)
        if self.config.budget is None:
            return sum(cores), sum(added)
        if self._counts_sites:
            return sum(cores[: int(self._capacity)]), sum(added[: int(self._capacity)])
        return min(sum(cores), sum(cores) - sum(added) + int(self._capacity)), int(self._capacity)

    @property
    def most_gauge_bytes(self) -> int:
        """Largest possible number of bytes that are kept beside the trained numbers: of bases and their moments."""
        decompositions = {name: self._decomposition.of_site(name) for name in self.candidates}
        sizes = (d.bases.bytes(*self.candidates[n].shape) for n, d in decompositions.items() if d.bases is not None)
        kept = sorted(sizes, reverse=True)
        return sum(kept[: int(self._capacity)] if self.config.budget is not None and self._counts_sites else kept)

    @property
    def is_over(self) -> bool:
        """Whether all decisions have been made."""
        return len(self.rounds) >= (self.config.rounds if self.config.schedule == "dynamic" else 1)

    @property
    def observed(self) -> GradientScore | None:
        """Score that needs every step's gradients at present, or None."""
        is_wanted = self.config.schedule == "dynamic" and not self.is_over
        return self.score if is_wanted and isinstance(self.score, GradientScore) else None

    def is_due(self, step: int) -> bool:
        """Whether a dynamic schedule has a round after this number of steps."""
        return bool(self.round_steps) and not self.is_over and step >= self.round_steps[len(self.rounds)]

    def choose(self, step: int) -> Round | None:
        """Make the next decision; None if all scores of A or of B are still zero, so that the round has to wait.

        Raises:
            ConfigError: The scores of a static schedule stay zero after its warm-up steps.
        """
        taken = {name for earlier in self.rounds for name in earlier.chosen}
        plain = [name for name in self.candidates if name not in taken]
        if self.config.schedule == "all":
            return self._record(step, {}, plain, 0)
        with undisturbed(self.probe, self.config.seed or 0), self._calibrated():
            found = self.score.values(self.probe)
        forwards = self.score.forwards(self.probe)
        device = next(iter(self.candidates.values())).parameter.device
        values = of_rank_zero([score if math.isfinite(score) else 0.0 for score in found.values()], device)
        known = {self.candidates[name].matrix for name, value in zip(found, values, strict=True) if value}
        unknown = " and ".join(sorted({site.matrix for site in self.candidates.values()} - known))
        if unknown:  # all scores of A or of B are zero, and cannot be ranked
            if self.config.schedule == "static":
                raise ConfigError(
                    f"schedule static: {self.config.score} is zero for every {unknown}, even after "
                    f"{self.config.calibration_steps} warm-up steps: none of these matrices changes the loss of "
                    "the calibration batches. Check the batches' labels, or raise calibration_batches."
                )
            if not self._waits:
                self._waits = True
                logger.warning(
                    "step %d: %s is zero for every %s while B = 0; the round waits", step, self.config.score, unknown
                )
            return None
        self._waits = False
        scores = {name: score for name, score in zip(found, values, strict=True) if name not in taken}
        done = (len(self.rounds) + 1) / (self.config.rounds if self.config.schedule == "dynamic" else 1)
        return self._record(step, scores, self._best(scores, taken, done), forwards)

    def replay(self, rounds: Iterable[Round]) -> None:
        """Take over the decisions that a resumed run has made before."""
        self.rounds = list(rounds)

    def _record(self, step: int, scores: dict[str, float], chosen: list[str], forwards: int) -> Round:
        found = Round(
            step=step, scores=scores, chosen=chosen, added=sum(self._added[name] for name in chosen), forwards=forwards
        )
        self.rounds.append(found)
        if self.config.schedule != "all":
            logger.info(
                "step %d: %d of %d sites over-parameterised by %s, %d parameters added%s",
                *(step, len(chosen), len(self.candidates), self.config.score, found.added),
                f" ({forwards} extra forwards)" if forwards else "",
            )
            for name, score in found.ranked.items():
                logger.info("  %.3e  %s", score, name)
        return found

    def _best(self, scores: Mapping[str, float], taken: set[str], done: float) -> list[str]:
        """Choose the best sites without cores, each from the quota group that is furthest below its share so far."""
        total = self._capacity * done
        everything = sum(self._cost(name) for name in self.candidates)
        ranked: dict[str, list[str]] = {}
        below: dict[str, float] = {}
        for name in sorted(self.candidates, key=lambda n: -scores.get(n, 0.0)):  # stable: ties by place
            site = self.candidates[name]
            group = {"global": "", "module": site.kind, "matrix": site.matrix, "layer": site.layer}[self.config.quota]
            spent = self._cost(name) if name in taken else 0
            below[group] = below.get(group, 0.0) + total * self._cost(name) / everything - spent
            if name not in taken:
                ranked.setdefault(group, []).append(name)
        left = (round(total) if self._counts_sites else total) - sum(self._cost(name) for name in taken)
        chosen: set[str] = set()
        while ranked:
            group = max(ranked, key=lambda g: below[g])
            if below[group] <= 0:
                break
            name = ranked[group].pop(0)
            if self._cost(name) <= left:
                left -= self._cost(name)
                below[group] -= self._cost(name)
                chosen.add(name)
            if not ranked[group]:
                del ranked[group]
        return [name for name in self.candidates if name in chosen]

    @property
    def _counts_sites(self) -> bool:
        return self.config.budget is not None and self.config.budget.parameters is None

    def _cost(self, name: str) -> int:
        return 1 if self._counts_sites else self._added[name]

    def _check_budget(self, budget: Budget) -> float:
        """Return the budget as a number of sites or of added parameters."""
        count, added = len(self.candidates), sum(self._added.values())
        if budget.fraction is not None:
            return max(1, round(budget.fraction * count))
        if budget.sites is not None:
            if budget.sites > count:
                raise ConfigError(f"budget.sites is {budget.sites}, but there are {count} candidate sites.")
            return budget.sites
        assert budget.parameters is not None
        least = min(self._added.values())
        if added == 0:
            raise ConfigError(
                f"budget.parameters counts trained numbers, of which {self.config.decomposition} adds none; give "
                "budget.sites or budget.fraction."
            )
        if not least <= budget.parameters <= added:
            raise ConfigError(
                f"budget.parameters is {budget.parameters}; the cores of one site add at least {least} parameters, "
                f"those of all {count} candidates {added}."
            )
        return budget.parameters

    def check_ready(self) -> None:
        """Raise ConfigError if a decision would lack the number of steps or the batches that it needs."""
        if self.config.schedule == "dynamic" and not self.round_steps:
            raise ConfigError(
                "a dynamic schedule spreads its rounds over the run: give the number of optimizer steps with `steps`."
            )
        if runs_model(self.config) and not self.is_over and (self.probe is None or not self.probe.batches):
            asking = f"schedule {self.config.schedule} with score {self.config.score}"
            if not _scores_run_model(self.config):
                asking = f"decomposition {self.config.decomposition} with bases from calibration"
            raise ConfigError(
                f"{asking} runs the model on calibration batches; give them with `probe`, or use the Trainer's "
                "callback, which takes them from the training data."
            )

    @contextmanager
    def _calibrated(self) -> Iterator[None]:
        """Show a static schedule's score gradients of the probe's batches, and restore the matrices after the block.

        Where B is zero, every score is zero, so some warm-up steps are taken first. Backward passes run in training
        mode, with dropout: only in that mode does a model checkpoint its activations.
        """
        if self.config.schedule != "static" or not _scores_run_model(self.config):
            yield
            return
        probe = self.probe
        assert probe is not None

        def backward(batch: object) -> None:
            with torch.enable_grad():
                torch.autograd.backward(probe.loss(probe.model, batch))

        kept = {name: full(site.values).clone() for name, site in self._sites.items()}
        try:
            with in_mode(probe.model, training=True):
                if not all(matrix.any() for matrix in kept.values()):
                    logger.warning(
                        "%s is zero while B = 0: %d warm-up steps on %d batches, undone afterwards",
                        *(self.config.score, self.config.calibration_steps, len(probe.batches)),
                    )
                    parameters = {id(p): p for site in self._sites.values() for p in site.holders()}
                    optimizer = torch.optim.Adam(list(parameters.values()), lr=CALIBRATION_RATE)
                    for step in range(self.config.calibration_steps):
                        backward(probe.batches[step % len(probe.batches)])
                        optimizer.step()
                        probe.model.zero_grad()
                if isinstance(self.score, GradientScore):
                    for batch in probe.batches:
                        backward(batch)
                        found = {name: site.gradient() for name, site in self.candidates.items()}
                        probe.model.zero_grad()
                        self.score.observe(gathered({name: g for name, g in found.items() if g is not None}))
            yield
        finally:
            for name, matrix in kept.items():
                write_matrices([self._sites[name]], matrix.unsqueeze(0))


def runs_model(config: LoraOverConfig) -> bool:
    """Whether a decision or an injection has to run the model on batches."""
    bases = config.make_decomposition().bases
    return _scores_run_model(config) or (bases is not None and bases.calibrates)


def _scores_run_model(config: LoraOverConfig) -> bool:
    score = SCORES[config.score]
    is_static = config.schedule == "static"
    return config.schedule != "all" and (score.needs_probe or (is_static and issubclass(score, GradientScore)))


def _round_steps(config: LoraOverConfig, steps: int) -> list[int]:
    """Return the number of steps after which each round of a dynamic schedule takes place."""
    fractions: Sequence[float] = [config.start]
    if config.rounds > 1:
        fractions = [config.start + (config.end - config.start) * k / (config.rounds - 1) for k in range(config.rounds)]
    found = [max(1, round(steps * fraction)) for fraction in fractions]
    if len(set(found)) < config.rounds or found[-1] >= steps:
        raise ConfigError(
            f"{config.rounds} rounds from {config.start:g} to {config.end:g} of {steps} steps would take place after "
            f"steps {', '.join(map(str, found))}; they must differ and come before the last step. Use fewer rounds or "
            "more steps."
        )
    return found
