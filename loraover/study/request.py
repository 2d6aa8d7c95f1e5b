"""What a study is asked for, checked before anything runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraover.common.errors import ConfigError

DEFAULT_SWEEP = (3e-4, 1e-3, 3e-3)
EXAMPLE = "expected different positive numbers such as 3e-4,1e-3,3e-3."


@dataclass(frozen=True)
class StudyRequest:
    """Tasks, methods, learning rates and seeds to compare.

    Args:
        recipes: Names of recipes that ship, or YAML files; each is a task.
        methods: Names of `METHOD_SETTINGS`, each with settings where wanted, see `make_grid`.
        lr_sweep: Learning rates by name: of a method on a task ("TASK/METHOD"), of a task (a recipe's name, for its
            other methods), of a method, or under the empty name of all other methods.
        seeds: Number of seeds, from 0.
        settings: Values of recipe keys that all runs share, by dotted key.
        tuning_seeds: Number of seeds that choose the rates; None: all.
        rulers: Methods that are trained and shown, but are neither baselines nor compared in the verdict.
        reuse: Folders of other studies, whose finished runs with the same recipe count as runs of this one.

    Raises:
        ConfigError: no seed, more tuning seeds than seeds, a ruler among the methods, rates that are not different
            positive numbers, an unknown name in `lr_sweep`, or a method without rates.
    """

    recipes: tuple[str, ...]
    methods: tuple[str, ...]
    lr_sweep: Mapping[str, tuple[float, ...]]
    seeds: int = 3
    settings: Mapping[str, Any] = field(default_factory=dict)
    tuning_seeds: int | None = None
    rulers: tuple[str, ...] = ()
    reuse: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"--seeds is {self.seeds}, expected 1 or more.")
        if self.tuning_seeds is not None and not 1 <= self.tuning_seeds <= self.seeds:
            raise ConfigError(f"--tuning-seeds is {self.tuning_seeds}, expected 1 to {self.seeds}, which is --seeds.")
        if both := sorted({*self.rulers} & {*self.methods}):
            raise ConfigError(f"--ruler names {both[0]!r}, which is one of --methods; name it once.")
        for name, rates in self.lr_sweep.items():
            is_usable = rates and all(0 < rate < float("inf") for rate in rates) and len(set(rates)) == len(rates)
            if not is_usable:
                found = ",".join(map(str, rates))
                raise ConfigError(f"--lr-sweep {f'{name}=' if name else ''}{found}: {EXAMPLE}")
        named = {name for name in self.lr_sweep if name}
        if both := sorted({*self.trained} & {*self.tasks} & named):
            raise ConfigError(
                f"--lr-sweep names {both[0]!r}, which is a method and a recipe; give the recipe another name."
            )
        pairs = {f"{task}/{method}": (task, method) for task in self.tasks for method in self.trained}
        if unknown := sorted(named - {*self.trained, *self.tasks, *pairs}):
            raise ConfigError(
                f"--lr-sweep names {unknown[0]!r}, which is none of --methods and --ruler, not a recipe's name, and "
                "not RECIPE/METHOD."
            )
        for pair, (task, method) in pairs.items():
            if not (pair in named or task in named or self.rates[method]):
                raise ConfigError(f"--lr-sweep gives no rates for {method!r}.")

    @property
    def tasks(self) -> tuple[str, ...]:
        """Name of each recipe."""
        return tuple(Path(recipe).stem for recipe in self.recipes)

    @property
    def trained(self) -> tuple[str, ...]:
        """Methods and rulers."""
        return (*self.methods, *self.rulers)

    @property
    def rates(self) -> dict[str, tuple[float, ...]]:
        """Learning rates of each method and ruler, where `task_rates` has none."""
        common = self.lr_sweep.get("", ())
        return {method: self.lr_sweep.get(method, common) for method in self.trained}

    @property
    def task_rates(self) -> dict[str, tuple[float, ...]]:
        """Learning rates of the tasks that have their own, by task or "TASK/METHOD"."""
        return {name: rates for name, rates in self.lr_sweep.items() if name and name not in self.trained}

    def command(self, output: Path) -> str:
        """Command line of this study."""
        words = ["loraover", "study", *self.recipes, "--methods", ",".join(self.methods)]
        words += [word for ruler in self.rulers for word in ("--ruler", ruler)]
        for name, rates in self.lr_sweep.items():
            words += ["--lr-sweep", f"{name}{'=' if name else ''}{','.join(map(str, rates))}"]
        words += ["--seeds", str(self.seeds)]
        words += [] if self.tuning_seeds is None else ["--tuning-seeds", str(self.tuning_seeds)]
        words += [word for key, value in self.settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        words += [word for study in self.reuse for word in ("--reuse", study)]
        return shlex.join([*words, "-o", str(output)])
