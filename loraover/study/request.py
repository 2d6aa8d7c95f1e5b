"""What a study is asked for, checked before anything runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraover.common.request import AnyNames, AnyPath, AnyPaths, Request, argument, option
from loraover.training.request_fields import ray_address, settings

Sweeps = Mapping[str, tuple[float, ...]]
"""Learning rates by name: of a method on a task ("TASK/METHOD"), of a task, of a method, or "" for all others."""

DEFAULT_SWEEP = (3e-4, 1e-3, 3e-3)
EXAMPLE = "expected different positive numbers such as 3e-4,1e-3,3e-3."
QUARTER = "lora-over:schedule=dynamic:budget={fraction: 0.25}:score="
DEFAULT_METHODS = ("lora", "lora-matched", "lora-over", f"{QUARTER}fisher", f"{QUARTER}random")
"""What a sceptic asks for: a tuned LoRA, one with as many trained numbers, and matrices chosen by chance."""


def split_outside_brackets(text: str, separator: str) -> list[str]:
    """Split a text, but not within [...] and {...}, where a separator is part of a YAML value."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _methods(given: str | Iterable[str]) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    return [method for text in texts for method in split_outside_brackets(text, ",")]


def _sweeps(given: Mapping[str, Sequence[Any]] | Sequence[Any]) -> Sweeps:
    """Learning rates by name, from those of Python or from texts such as "lora=1e-3,3e-3"."""
    if isinstance(given, Mapping):
        pairs = list(given.items())
    elif texts := [one for one in given if isinstance(one, str)]:
        pairs = [(name, rates.split(",")) for name, _, rates in (text.rpartition("=") for text in texts)]
    else:
        pairs = [("", given)]
    if len(dict(pairs)) < len(pairs):
        raise ValueError("gives two sweeps to one name, or two without a name.")
    return {name: _rates(name, rates) for name, rates in pairs}


def _rates(name: str, given: Sequence[Any]) -> tuple[float, ...]:
    try:
        rates = tuple(map(float, given))
    except ValueError:
        rates = ()
    if rates and all(0 < rate < float("inf") for rate in rates) and len(set(rates)) == len(rates):
        return rates
    raise ValueError(f"{_sweep_text(name, given)}: {EXAMPLE}")


def _sweep_text(name: str, rates: Sequence[Any]) -> str:
    return f"{name}{'=' if name else ''}{','.join(map(str, rates))}"


def _names(given: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """Methods by short name, from those of Python or from texts such as "wide=lora:r=64"."""
    pairs = list(given.items()) if isinstance(given, Mapping) else [_name(text) for text in given]
    names = dict(pairs)
    if len(names) < len(pairs) or len({*names.values()}) < len(names):
        raise ValueError("gives one name to two methods, or two names to one method.")
    if wrong := next((name for name in names if not re.fullmatch(r"[A-Za-z0-9.+_-]+", name)), None):
        raise ValueError(f"names {wrong!r}, expected letters, digits and the marks . + _ - only.")
    return names


def _name(text: str) -> tuple[str, str]:
    name, equals, method = text.partition("=")
    if not (equals and method):
        raise ValueError(f"is {text!r}, expected NAME=METHOD such as wide=lora:r=64.")
    return name, method


@dataclass(frozen=True)
class StudyRequest(Request):
    """Train RECIPEs with several methods, learning rates and seeds, and compare the methods at their best rates.

    Finished runs are kept: the same command continues a study that was stopped.
    """

    verb = "loraover study"
    extra = "train"
    examples = (
        "loraover study gsm8k-smollm2 --lr-sweep 3e-4,1e-3,3e-3 --seeds 5 -o study",
        "loraover study demo --methods lora,lora-over --lr-sweep lora=1e-3,3e-3 --lr-sweep 3e-4,1e-3 -o study",
        "loraover study demo --methods lora,wide,lora-over --name wide=lora:r=64 --required 1 -o study",
        "loraover study demo --methods lora,lora-over --seeds 5 -o study --power pilot",
    )

    recipes: AnyNames = argument("Names of recipes that ship, or YAML files; each is a task.", metavar="RECIPE...")
    output: AnyPath = option("Folder of the study: new, or one to continue.", short="-o")
    methods: AnyNames = option(
        "Methods to compare, separated by commas, with settings where wanted; see docs/study/.",
        default=DEFAULT_METHODS,
        default_text="plain LoRA, plain LoRA with as many trained numbers as LoRA-Over, LoRA-Over of all matrices, and "
        "of a quarter of them chosen by score and by chance",
        converts=_methods,
        writes=lambda methods: [",".join(methods)],
    )
    names: Mapping[str, str] = option(
        "Short name of a method, which the other options take and reports show in its place.",
        default=(),
        default_text="none",
        flag="--name",
        metavar="NAME=METHOD",
        converts=_names,
        writes=lambda names: [f"{name}={method}" for name, method in names.items()],
    )
    required: int | None = option(
        "Number of tasks on which LoRA-Over's loss has to be below the baseline's for the verdict 'better'. It is "
        "fixed before the first run and cannot be changed afterwards.",
        default=None,
        default_text="all tasks",
        least=1,
    )
    lr_sweep: Sequence[float] | Mapping[str, Sequence[float]] = option(
        "Learning rates to try. NAME limits them to one method (lora), one task (a recipe's name) or one method on one "
        "task (demo/lora); rates without a name apply to all others.",
        default=DEFAULT_SWEEP,
        default_text="3e-4,1e-3,3e-3",
        metavar="[NAME=]RATES",
        converts=_sweeps,
        writes=lambda sweeps: [_sweep_text(*sweep) for sweep in sweeps.items()],
    )
    seeds: int = option("Number of seeds, which are 0, 1, 2 and so on.", default=3, least=1)
    tuning_seeds: int | None = option(
        "Number of seeds that choose each method's rate; the others are trained at the chosen one only.",
        default=None,
        default_text="all",
        least=1,
    )
    rulers: AnyNames = option(
        "Method to show for scale, such as lora:r=16. It is not a baseline and does not count in the verdict.",
        default=(),
        flag="--ruler",
        metavar="METHOD",
    )
    settings: Mapping[str, Any] | None = settings("Value of a recipe key for all runs, such as training.max_steps=60.")
    jobs: int = option("Number of runs at the same time on this machine.", default=1, least=1, is_recorded=False)
    ray: str | None = ray_address("the runs")
    reuse: AnyPaths = option(
        "Folder of another study, whose finished runs with the same recipe count as runs of this one.",
        default=(),
        metavar="STUDY",
    )
    power: AnyPath | None = option(
        "Folder of a pilot or kept study. Print the smallest difference that this study would see with its spread, and "
        "train nothing.",
        default=None,
        metavar="STUDY",
    )
    report_only: bool = option("Judge the runs that are finished, and train nothing.", default=False, is_recorded=False)

    def faults(self) -> Iterator[str]:
        sweep, ruler, methods = map(self.named, ("lr_sweep", "rulers", "methods"))
        if self.required is not None and self.required > len(self.tasks):
            yield f"{self.named('required', self.required)}: expected 1 to {len(self.tasks)}, the number of recipes."
        if unused := sorted({*self.names.values()} - {*self.trained}):
            yield f"{self.named('names')} names {unused[0]!r}, which is none of {methods} and {ruler}."
        if self.tuning_seeds is not None and self.tuning_seeds > self.seeds:
            seeds = self.named("seeds")
            yield f"{self.named('tuning_seeds')} is {self.tuning_seeds}, expected 1 to {self.seeds}, which is {seeds}."
        if self.power is not None and self.seeds < 2:
            yield f"{self.named('power')} needs two seeds or more, found {self.named('seeds', self.seeds)}."
        if both := sorted({*self.spelled(self.rulers)} & {*self.spelled(self.methods)}):
            yield f"{ruler} names {both[0]!r}, which is one of {methods}; name it once."
        named = {name for name in self.sweeps if name}
        if both := sorted({*self.trained} & {*self.tasks} & named):
            yield f"{sweep} names {both[0]!r}, which is a method and a recipe; give the recipe another name."
        pairs = {f"{task}/{method}": (task, method) for task in self.tasks for method in self.trained}
        if unknown := sorted(named - {*self.trained, *self.tasks, *pairs}):
            yield (
                f"{sweep} names {unknown[0]!r}, which is none of {methods} and {ruler}, not a recipe's name, and not "
                "RECIPE/METHOD."
            )
        for pair, (task, method) in pairs.items():
            if not (pair in named or task in named or self.rates[method]):
                yield f"{sweep} gives no rates for {method!r}."

    @property
    def sweeps(self) -> Sweeps:
        """Learning rates by name, from `lr_sweep`, with methods in full."""
        assert isinstance(self.lr_sweep, Mapping)
        return {self._spelled_key(name): tuple(rates) for name, rates in self.lr_sweep.items()}

    def _spelled_key(self, name: str) -> str:
        task, slash, method = name.rpartition("/")
        return f"{task}{slash}{self.names[method]}" if method in self.names else name

    def spelled(self, methods: Iterable[str]) -> tuple[str, ...]:
        """Return methods in full, where some have short names."""
        return tuple(self.names.get(method, method) for method in methods)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Name of each recipe."""
        return tuple(Path(recipe).stem for recipe in self.recipes)

    @property
    def trained(self) -> tuple[str, ...]:
        """Methods and rulers, in full."""
        return self.spelled((*self.methods, *self.rulers))

    @property
    def rates(self) -> dict[str, tuple[float, ...]]:
        """Learning rates of each method and ruler, where `task_rates` has none."""
        common = self.sweeps.get("", ())
        return {method: self.sweeps.get(method, common) for method in self.trained}

    @property
    def task_rates(self) -> dict[str, tuple[float, ...]]:
        """Learning rates of the tasks that have their own, by task or "TASK/METHOD"."""
        return {name: rates for name, rates in self.sweeps.items() if name and name not in self.trained}
