"""The runs of a study."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from loraover.common.errors import ConfigError
from loraover.models.load import load_skeleton, resolve_model
from loraover.training.launch.settings import check_keys
from loraover.training.method_table import METHODS
from loraover.training.recipe import LEARNS_TOKENS, Recipe, load_recipe, parse_override
from loraover_lab.study.request import StudyRequest, StudyTask, split_outside_brackets, study_tasks

METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "rslora": {"method": "lora", "lora.use_rslora": True},
    "dora": {"method": "lora", "lora.use_dora": True},
    "pissa": {"method": "lora", "lora.init_lora_weights": "pissa"},
    "lora+": {"method": "lora", "training.loraplus_lr_ratio": 16.0},
    "lora-matched": {"method": "lora"},
    "full": {"method": "full"},
    "lora-over": {"method": "lora-over"},
    **{name: {"method": name} for name in METHODS},
}
"""Recipe keys that each method sets; `lora-matched` also sets the rank at which A and B are as many as the cores."""

PLAIN = ("lora", "lora+", "lora-matched")
"""Methods that train plain A and B; the others are compared with the best of these, whatever its rank or training."""

VARIANTS = {
    key.removeprefix("lora.") for settings in METHOD_SETTINGS.values() for key in settings if key.startswith("lora.")
}
VARIANTS |= {"training.optim", "start_from"}
"""Settings with which plain LoRA counts as another method."""

RECIPE_PARTS = ("data.", "lora.", "over.", "training.", *(f"{method}." for method in METHODS))
"""Beginnings of the settings that are also keys of the recipe."""

SWEPT = {"training.learning_rate": "lr_sweep", "training.seed": "seeds", "method": "methods"}
"""Arguments of a study, by the recipe keys that only they set, and neither a method nor `settings`."""

DEFAULTS = {"evaluation.exact_match": False, "evaluation.before": False, "diagnostics": True}
"""Recipe keys that a study sets by default: losses are measured after training, and steps are timed."""

FEWEST_EXAMPLES = 4
"""Smallest number of held-out examples: half of them choose the rates, and an interval needs two."""

LONGEST_NAME = 150  # characters of a folder's name; file systems take 255


@dataclass(frozen=True, eq=False)
class Run:
    """Training run of a study.

    Args:
        task: Name of its task, see `StudyTask`.
        method: Method as the user named it, settings included.
        rate: Learning rate.
        recipe: Recipe with all settings of the run.
        is_ruler: Whether the method is shown only, and belongs neither to the baselines nor to the verdict.
        short: Short name of the method in reports; None: it has none.
    """

    task: str
    method: str
    rate: float
    seed: int
    recipe: Recipe
    is_ruler: bool = False
    short: str | None = None

    @property
    def name(self) -> str:
        """Name in the study's `runs.jsonl`."""
        return f"{self.task}/{slug(self.method)}/lr-{self.rate:g}/seed-{self.seed}"

    @property
    def folder(self) -> Path:
        """Path below the study's folder."""
        return Path("runs") / self.name


def grid_of(request: StudyRequest) -> list[Run]:
    """List every combination, seed by seed, so that a study that is stopped has complete seeds.

    A method is a name of `METHOD_SETTINGS`, with settings where wanted, as in
    "lora-over:schedule=dynamic:budget={fraction: 0.25}". A setting that begins with an entry of `RECIPE_PARTS` is a key
    of the recipe; the other settings of lora-over are keys of `over`, those of other methods keys of `lora`.
    """
    rates, rulers, settings = request.rates, request.spelled(request.rulers), DEFAULTS | dict(request.settings or {})
    if not any(is_plain(method) for method in rates if method not in rulers):
        raise ConfigError(
            f"{StudyRequest.named('methods')}: a study compares with plain LoRA; add {' or '.join(PLAIN)}."
        )
    _refuse_swept(settings, f"{StudyRequest.named('settings')} sets")
    if taken := sorted({*request.names} & {*METHOD_SETTINGS}):
        raise ConfigError(f"{StudyRequest.named('names')}: {taken[0]!r} is a method; give yours another name.")
    short = {method: name for name, method in request.names.items()}
    special = request.task_rates
    tasks = study_tasks(request.recipes, request.models)
    own = [(task, method, _settings(task, method, settings)) for task in tasks for method in rates]
    runs = []
    for seed in range(request.seeds):
        for task, method, chosen in own:
            for rate in special.get(f"{task.name}/{method}", special.get(task.name, rates[method])):
                values = chosen | {"training.learning_rate": rate, "training.seed": seed}
                recipe = load_recipe(task.recipe, values)
                runs.append(Run(task.name, method, rate, seed, recipe, method in rulers, short.get(method)))
    for run in {(run.task, run.method): run for run in runs}.values():
        check_keys(run.recipe)
        if run.recipe.trainer not in LEARNS_TOKENS:
            raise ConfigError(
                f"{run.task}: a study compares losses of tokens, which trainer {run.recipe.trainer} lacks."
            )
    if nameless := [run.task for run in runs if run.task in (".", "..")]:
        raise ConfigError(f"a recipe named {nameless[0]!r} would leave the study's folder; give it another name.")
    folders = Counter(run.folder for run in runs)
    for run in runs:
        if folders[run.folder] > 1:
            raise ConfigError(
                f"two runs would share {run.folder}; give recipes different names, and methods and rates ones that "
                "differ by more than marks or a seventh digit."
            )
        held_out = min(run.recipe.evaluation.examples, run.recipe.data.test_examples or FEWEST_EXAMPLES)
        if held_out < FEWEST_EXAMPLES:
            raise ConfigError(
                f"{run.task}: a study takes {FEWEST_EXAMPLES} held-out examples or more, found {held_out}."
            )
    return runs


def is_plain(method: str) -> bool:
    """Whether a method is a plain LoRA or LoRA+, with settings such as `r=64` and those of `training` too."""
    name, *own = split_outside_brackets(method, ":")
    keys = {setting.partition("=")[0].strip().removeprefix("lora.") for setting in own}
    return name in PLAIN and not VARIANTS & keys


def _settings(task: StudyTask, method: str, given: dict[str, Any]) -> dict[str, Any]:
    shared = given | task.settings
    name, *own = split_outside_brackets(method, ":")
    if name not in METHOD_SETTINGS:
        known = ", ".join(METHOD_SETTINGS)
        raise ConfigError(f"{StudyRequest.named('methods')}: {name!r} is unknown, expected one of {known}.")
    part = "over" if name == "lora-over" else "lora"
    chosen = {
        key if key.startswith(RECIPE_PARTS) else f"{part}.{key}": value for key, value in map(parse_override, own)
    }
    _refuse_swept(chosen, f"{StudyRequest.named('methods')}: {method} sets")
    if name == "lora-matched":
        if "lora.r" in chosen:
            raise ConfigError(
                f"{StudyRequest.named('methods')}: lora-matched chooses its rank; write lora:r=N for another one."
            )
        chosen["lora.r"] = matched_rank(load_recipe(task.recipe, shared | METHOD_SETTINGS[name] | chosen))
    return shared | METHOD_SETTINGS[name] | chosen


def _refuse_swept(settings: Collection[str], who: str) -> None:
    for key, option in SWEPT.items():
        if key in settings:
            raise ConfigError(f"{who} {key}, which a study varies; use {StudyRequest.named(option)}.")


def matched_rank(recipe: Recipe) -> int:
    """Smallest rank at which a plain LoRA has as many numbers as LoRA-Over with the recipe's `over` can train.

    LoRA-Over trains all matrices, and the numbers that the cores of the schedule have beyond those of their matrices.
    """
    if recipe.lora.rank_pattern:
        raise ConfigError(
            f"{StudyRequest.named('methods')}: lora-matched chooses lora.r, and the modules of lora.rank_pattern would "
            "keep their ranks; leave out one of the two."
        )
    from loraover.overparam.schedule import Schedule
    from loraover.overparam.sites import find_sites
    from loraover.training.launch.settings import with_adapter

    source = resolve_model(recipe.model, recipe.model_revision)
    base = load_skeleton(source)
    lora = recipe.lora.model_copy(update={"init_lora_weights": False})
    task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    sites = find_sites(with_adapter(base, recipe.model_copy(update={"lora": lora}), task, source))
    _, added = Schedule(recipe.over, sites, steps=None, probe=None).most_parameters
    matrices = sum(site.size for site in sites.values())
    return -(-recipe.lora.r * (matrices + added) // matrices)


def slug(method: str) -> str:
    """Return the folder name of a method."""
    name = re.sub(r"[^A-Za-z0-9.+=-]+", "_", method)
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}-{sha256(method.encode()).hexdigest()[:8]}"
