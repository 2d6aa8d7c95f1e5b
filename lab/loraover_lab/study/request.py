"""Request of a study, checked before anything runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from loraover.common.errors import ConfigError
from loraover.common.request import AnyNames, AnyPath, AnyPaths, Request, argument, declarations, option
from loraover.common.strict_yaml import parse_yaml
from loraover.training.request import ray_address, values_by_key
from loraover_lab.evaluation import TASKS
from loraover_lab.evaluation.request import EvaluationRequest

Sweeps = Mapping[str, tuple[float, ...]]
"""Learning rates by name: of a method on a task ("TASK/METHOD"), of a task, of a method, or "" for all others."""

DEFAULT_SWEEP = (3e-4, 1e-3, 3e-3)
EXAMPLE = "expected different positive numbers such as 3e-4,1e-3,3e-3."
QUARTER = "lora-over:schedule=dynamic:budget={fraction: 0.25}:score="
DEFAULT_METHODS = ("lora", "lora-matched", "lora-over", f"{QUARTER}fisher", f"{QUARTER}random")
"""Methods that a sceptic asks for: a tuned LoRA, one with as many trained numbers, and matrices chosen by chance."""


PAPER_TABLES = ("paper-glue", "paper-mtbench", "paper-gsm8k", "paper-humaneval")
"""Studies that ship, each a table of arXiv:2605.16470, by their names in `paper.yaml`."""

STUDY_SETS = (
    "model",
    "task",
    "adapters",
    "output",
    "on_result",
    "endpoint",
    "endpoint_models",
    "key_variable",
)
"""Arguments of an evaluation that a study sets, or that are for servers."""


def read_table(name: str) -> dict[str, Any]:
    """Read what a table of the paper fixes: arguments of `StudyRequest` by name, without `choices`."""
    tables = _tables()
    return {key: value for key, value in (tables["shared"] | tables[name]).items() if key != "choices"}


def table_choices(name: str | None) -> list[str]:
    """Return sentences on what the paper's abstract leaves open; none for another study."""
    if name is None:
        return []
    tables = _tables()
    return [*tables["shared"]["choices"], *tables[name]["choices"]]


def _tables() -> dict[str, Any]:
    content = files("loraover_lab.study").joinpath("paper.yaml").read_text(encoding="utf-8")
    tables: dict[str, Any] = parse_yaml(content)
    return tables


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
    """Learning rates by name, from Python's values or from texts such as "lora=1e-3,3e-3"."""
    if not given or isinstance(given, Mapping):
        pairs = list(dict(given).items())
    elif texts := [one for one in given if isinstance(one, str)]:
        pairs = [(name, rates.split(",")) for name, _, rates in (text.rpartition("=") for text in texts)]
    else:
        pairs = [("", given)]
    if len(dict(pairs)) < len(pairs):
        raise ValueError("gives two sweeps to one name, or two without a name.")
    sweeps = {}
    for name, written in pairs:
        try:
            rates = tuple(map(float, written))
        except ValueError:
            rates = ()
        if not rates or not all(0 < rate < float("inf") for rate in rates) or len(set(rates)) < len(rates):
            raise ValueError(f"{_sweep_text(name, written)}: {EXAMPLE}")
        sweeps[name] = rates
    return sweeps


def _sweep_text(name: str, rates: Sequence[Any]) -> str:
    return f"{name}{'=' if name else ''}{','.join(map(str, rates))}"


def _names(given: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """Methods by short name, from Python's values or from texts such as "wide=lora:r=64"."""
    pairs = list(given.items()) if isinstance(given, Mapping) else []
    for text in given if not isinstance(given, Mapping) else ():
        name, equals, method = text.partition("=")
        if not (equals and method):
            raise ValueError(f"is {text!r}, expected NAME=METHOD such as wide=lora:r=64.")
        pairs.append((name, method))
    names = dict(pairs)
    if len(names) < len(pairs) or len({*names.values()}) < len(names):
        raise ValueError("gives one name to two methods, or two names to one method.")
    if wrong := next((name for name in names if not re.fullmatch(r"[A-Za-z0-9.+_-]+", name)), None):
        raise ValueError(f"names {wrong!r}, expected letters, digits and the marks . + _ - only.")
    return names


class StudyTask(NamedTuple):
    """Task of a study.

    Args:
        name: Name of the recipe, with the model's where there are several models.
        recipe: Name of a recipe that ships, or a YAML file.
        settings: Values of recipe keys, which name the base model if the study does.
    """

    name: str
    recipe: str
    settings: dict[str, Any]


def study_tasks(recipes: Sequence[str], models: Sequence[str]) -> list[StudyTask]:
    """Return the tasks of a study: every recipe, on every model if there are any."""
    if not models:
        return [StudyTask(Path(recipe).stem, recipe, {}) for recipe in recipes]
    return [
        StudyTask(
            Path(recipe).stem if len(models) == 1 else f"{Path(recipe).stem}-{Path(model).name}",
            recipe,
            {"model": model, "model_revision": None},
        )
        for model in models
        for recipe in recipes
    ]


@dataclass(frozen=True)
class StudyRequest(Request):
    """Train RECIPEs with several methods, learning rates and seeds, and compare the methods at their best rates.

    Finished runs are kept: the same command continues a study that was stopped. The name of a table of the paper, in
    place of recipes, repeats it; see docs/study/.
    """

    verb = "loraover study"
    extra = "lab"
    examples = (
        "loraover study gsm8k-smollm2 --lr-sweep 3e-4,1e-3,3e-3 --seeds 5 -o study",
        "loraover study demo --methods lora,lora-over --lr-sweep lora=1e-3,3e-3 --lr-sweep 3e-4,1e-3 -o study",
        "loraover study demo --methods lora,wide,lora-over --name wide=lora:r=64 --required 1 -o study",
        "loraover study demo --methods lora,lora-over --seeds 5 -o study --power pilot",
        "loraover study paper-gsm8k --model meta-llama/Llama-3.1-8B -o gsm8k --plan",
    )

    recipes: AnyNames = argument("Names of recipes that ship, or YAML files; each is a task.", metavar="RECIPE...")
    output: AnyPath = option("Folder of the study: new, or one to continue.", short="-o")
    methods: AnyNames = option(
        "Methods to compare, separated by commas, with settings where wanted; see docs/study/.",
        default=(),
        default_text="those of the paper's table, or plain LoRA, plain LoRA with as many trained numbers as LoRA-Over, "
        "LoRA-Over of all matrices, and of a quarter of them chosen by score and by chance",
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
        default=(),
        default_text="those of the paper's table, or 3e-4,1e-3,3e-3",
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
    settings: Mapping[str, Any] | None = values_by_key(
        "Value of a recipe key for all runs, such as training.max_steps=60."
    )
    models: AnyNames = option(
        "Base model in place of the recipes'. With several, each recipe is a task on each of them.",
        default=(),
        flag="--model",
        are_different=True,
    )
    benchmark: str | None = option(
        "Benchmark on which every adapter that counts in the verdict is scored, see docs/evaluation.md.",
        default=None,
        choices=tuple(TASKS),
    )
    benchmark_settings: Mapping[str, Any] | None = values_by_key(
        "Option of the command eval for the benchmark, such as limit=100 or judge_url=URL.", "--ask"
    )
    jobs: int = option("Number of runs at the same time on this machine.", default=1, least=1, is_recorded=False)
    ray: str | None = ray_address("the runs")
    reuse: AnyPaths = option(
        "Folder of another study, whose finished runs with the same recipe count as runs of this one.",
        default=(),
        metavar="STUDY",
    )
    power: AnyPath | None = option(
        "Folder of an earlier study, such as a pilot. Print the smallest difference that this study could detect, if "
        "its results vary as much as there, and train nothing.",
        default=None,
        metavar="STUDY",
    )
    plan: bool = option(
        "Print the number of runs that the study needs, their memory, and their time after a trial, and train nothing.",
        default=False,
        is_recorded=False,
    )
    report_only: bool = option(
        "Report on the runs that are finished, and train nothing.", default=False, is_recorded=False
    )

    def whole(self) -> StudyRequest:
        """Return this request with its open arguments filled from the paper's table or the defaults."""
        if self.is_whole:
            return self
        table: dict[str, Any] = {"methods": DEFAULT_METHODS, "lr_sweep": DEFAULT_SWEEP}
        if self.table is not None:
            table |= read_table(self.table)
        given = {name: getattr(self, name) for name in declarations(type(self)) if self._is_given(name)}
        for name in ("names", "settings", "benchmark_settings"):
            given[name] = {**(table.get(name) or {}), **(getattr(self, name) or {})}
        methods = {*(self.methods or table["methods"]), *self.rulers}
        given["names"] = {name: one for name, one in given["names"].items() if name in self.names or name in methods}
        given["recipes"] = table.get("recipes", self.recipes)
        return StudyRequest(**(table | given), report=self.report)

    @property
    def table(self) -> str | None:
        """Name of the paper's table that is asked for in place of recipes."""
        return self.recipes[0] if len(self.recipes) == 1 and self.recipes[0] in PAPER_TABLES else None

    @property
    def is_whole(self) -> bool:
        """Whether no argument is left open."""
        return bool(self.methods and self.lr_sweep and self.table is None)

    def faults(self) -> Iterator[str]:
        tables = [name for name in self.recipes if name.startswith("paper-") and not Path(name).exists()]
        if wrong := tables if self.table is None else []:
            yield f"{wrong[0]!r}: a table of the paper stands alone, and is one of {', '.join(PAPER_TABLES)}."
            return
        if not self.is_whole:
            self.whole()
            return
        yield from self._faults_of_comparison()
        yield from self._faults_of_benchmark()

    def _faults_of_benchmark(self) -> Iterator[str]:
        asked = self.named("benchmark_settings")
        if self.benchmark is None:
            if self.benchmark_settings:
                yield f"{asked} needs {self.named('benchmark')}, which is missing."
            return
        if (self.settings or {}).get("evaluation.exact_match"):
            yield f"{self.named('benchmark')} and evaluation.exact_match both give the scores; leave one out."
        if self.ray is not None:
            yield f"{self.named('benchmark')} needs the adapters, which Ray's workers do not keep; leave one out."
        known = [name for name in declarations(EvaluationRequest) if name not in STUDY_SETS]
        if unknown := sorted({*(self.benchmark_settings or {})} - {*known}):
            yield f"{asked} names {unknown[0]!r}, expected one of {', '.join(known)}."
            return
        try:
            self.evaluation("model", ("adapter",), None)
        except ConfigError as error:
            yield f"{asked}: {error}"

    def evaluation(self, model: str, adapters: Sequence[str], output: Path | None) -> EvaluationRequest:
        """Return the request of the benchmark for the folders of some adapters, with its file of results."""
        assert self.benchmark is not None
        asked: dict[str, Any] = dict(self.benchmark_settings or {})
        places: dict[str, Any] = {"adapters": adapters, "output": output, "report": self.report}
        return EvaluationRequest(model, task=self.benchmark, **places, **asked)

    def _faults_of_comparison(self) -> Iterator[str]:
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
        parted = [(name.rpartition("/"), tuple(rates)) for name, rates in self.lr_sweep.items()]
        return {f"{task}{slash}{self.names.get(method, method)}": rates for (task, slash, method), rates in parted}

    def spelled(self, methods: Iterable[str]) -> tuple[str, ...]:
        """Return methods in full, where some have short names."""
        return tuple(self.names.get(method, method) for method in methods)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Name of each task."""
        return tuple(task.name for task in study_tasks(self.recipes, self.models))

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
