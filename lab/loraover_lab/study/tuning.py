"""Choice of each method's learning rate, and the runs that follow from it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np

from loraover.common.errors import LoraOverError
from loraover.data.sources import BUILT_IN
from loraover_lab.study.analysis import Halves, Losses, RateSensitivity, mean_loss, sensitivity
from loraover_lab.study.grid import FEWEST_EXAMPLES, Run
from loraover_lab.study.outcome import RunOutcome


class RunPlan(NamedTuple):
    """Runs that a study needs.

    Args:
        runs: Runs whose rate is known, seed by seed.
        undecided: By task, the number of further runs, which wait for the choice of their rate.
    """

    runs: list[Run]
    undecided: Counter[str]

    @property
    def total(self) -> int:
        """Number of all runs."""
        return len(self.runs) + self.undecided.total()

    def left(self, outcomes: Mapping[Run, RunOutcome]) -> Counter[str]:
        """Count the runs of each task that are not finished."""
        return Counter(run.task for run in self.runs if run not in outcomes) + self.undecided


def plan_runs(grid: Sequence[Run], outcomes: Mapping[Run, RunOutcome], tuning_seeds: int | None) -> RunPlan:
    """List the runs that a study needs, as far as its rates are chosen.

    The first seeds are trained at every rate. A method's further seeds are trained at its chosen rate only; if a run
    fails there, they are trained at the next best rate.
    """
    check_inputs(outcomes)
    seeds = len({run.seed for run in grid})
    if tuning_seeds is None or tuning_seeds >= seeds:
        return RunPlan(list(grid), Counter())
    rates: dict[tuple[str, str], float] = {}
    undecided: Counter[str] = Counter()
    for task, methods in by_method(grid).items():
        tokens = tokens_of([run for runs in methods.values() for run in runs if run in outcomes], outcomes)
        for method, runs in methods.items():
            if not all(run in outcomes for run in runs if run.seed < tuning_seeds):
                undecided[task] += seeds - tuning_seeds
            elif found := tune(runs, outcomes, tuning_seeds, tokens):
                rates[task, method] = found.best_rate
    runs = [run for run in grid if run.seed < tuning_seeds or rates.get((run.task, run.method)) == run.rate]
    return RunPlan(runs, undecided)


def chosen_runs(grid: Sequence[Run], outcomes: Mapping[Run, RunOutcome], tuning_seeds: int | None) -> list[Run]:
    """List the runs that are compared: each method's at its chosen rate, without those that failed."""
    tuning = len({run.seed for run in grid}) if tuning_seeds is None else tuning_seeds
    found: list[Run] = []
    for methods in by_method([run for run in grid if run in outcomes]).values():
        tokens = tokens_of([run for runs in methods.values() for run in runs], outcomes)
        for runs in methods.values():
            tuned = tune(runs, outcomes, tuning, tokens)
            found += [run for run in runs if tuned is not None and run.rate == tuned.best_rate]
    return [run for run in found if outcomes[run].failure is None]


def check_inputs(outcomes: Mapping[Run, RunOutcome]) -> None:
    """Check that runs which should have had the same rows and base model had them, where that is known.

    Runs of one task share their held-out rows. Those with the same settings of `data` share their training rows, but
    for the built-in word problems, which are made anew for each seed. A model of the hub has one commit throughout, and
    an adapter that runs start from one digest.
    """
    first: dict[tuple[str, ...], tuple[Run, str]] = {}
    for run, outcome in outcomes.items():
        data, model, asked = run.recipe.data, run.recipe.model, run.recipe.model_revision
        seed = str(run.seed) if data.train == BUILT_IN else ""
        changed = "were the data changed? Start a new study"
        moved = "start a new study whose recipes name one of them as model_revision"
        start, trained_anew = run.recipe.lora.start_from, "was lora.start_from trained anew? Start a new study"
        for found, key, what, advice in (
            (outcome.test_rows, (run.task,), "held-out rows", changed),
            (outcome.train_rows, (run.task, data.model_dump_json(), seed), "training rows", changed),
            (outcome.model_revision, (model, str(asked)), f"commits of the base model {model}", moved),
            (outcome.started_from, (str(start),), "adapters to start from", trained_anew),
        ):
            if found is None:
                continue
            other, expected = first.setdefault((what, *key), (run, found))
            if found != expected:
                raise LoraOverError(
                    f"{run.folder} and {other.folder} had different {what}, so they cannot be compared; {advice}."
                )


def by_method(runs: Sequence[Run]) -> dict[str, dict[str, list[Run]]]:
    """Group runs by task, and then by method."""
    found: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        found.setdefault(run.task, {}).setdefault(run.method, []).append(run)
    return found


def tune(
    runs: Sequence[Run], outcomes: Mapping[Run, RunOutcome], tuning_seeds: int, tokens: Losses
) -> RateSensitivity | None:
    """Describe how a method's validation loss depends on its rate; None if it failed at every rate."""
    half = Halves(len(tokens)).validation
    means: dict[float, float] = {}
    each: dict[float, list[float]] = {}
    for rate in dict.fromkeys(run.rate for run in runs):
        same = [run for run in runs if run.rate == rate and run in outcomes]
        tuning = [outcomes[run] for run in same if run.seed < tuning_seeds]
        if any(outcomes[run].failure is not None for run in same):
            means[rate] = math.inf
            continue
        losses = losses_of(tuning, half)
        means[rate] = mean_loss(losses, tokens[half])
        each[rate] = [mean_loss(row[None], tokens[half]) for row in losses]
    return sensitivity(means, each) if any(map(math.isfinite, means.values())) else None


def losses_of(outcomes: Sequence[RunOutcome], half: slice) -> Losses:
    """Nats of each completion, shape (seeds, examples of that half)."""
    return np.array([outcome.nats[half] for outcome in outcomes])


def validation_loss(outcomes: Sequence[RunOutcome]) -> float:
    """Nats per token on the validation half, mean over runs that were evaluated on the same examples."""
    tokens = np.array(outcomes[0].tokens, dtype=np.float64)
    half = Halves(len(tokens)).validation
    return mean_loss(losses_of(outcomes, half), tokens[half])


def tokens_of(runs: Sequence[Run], outcomes: Mapping[Run, RunOutcome]) -> Losses:
    """Tokens of each completion, shape (examples,); empty where all runs of the task failed."""
    scored = {str(run.folder): outcomes[run] for run in runs if outcomes[run].failure is None}
    return tokens_of_all(scored) if scored else np.zeros(0)


def tokens_of_all(scored: Mapping[str, RunOutcome]) -> Losses:
    """Tokens of each completion, shape (examples,)."""
    first, *others = scored
    tokens = scored[first].tokens
    if len(tokens) < FEWEST_EXAMPLES:
        raise LoraOverError(f"{first}: has {len(tokens)} held-out examples, expected {FEWEST_EXAMPLES}.")
    for other in others:
        if scored[other].tokens != tokens:
            raise LoraOverError(
                f"{other} and {first} were evaluated on different held-out examples, so they cannot be compared; were "
                "the data changed? Start a new study."
            )
    return np.array(tokens, dtype=np.float64)


def hours_left(left: Mapping[str, int], seconds: Mapping[str, Sequence[float]], jobs: int) -> float | None:
    """Estimate the hours that the remaining runs take; None before a run has been timed."""
    known = [duration for durations in seconds.values() for duration in durations]
    if not known:
        return None
    total = sum(number * median(seconds.get(task) or known) for task, number in left.items())
    return total / jobs / 3600
