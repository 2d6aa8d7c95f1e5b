"""Which runs a study consists of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraover.errors import ConfigError
from loraover.models import load_skeleton, resolve_model
from loraover.recipe import Recipe, load_recipe, parse_override

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "rslora": {"method": "lora", "lora.use_rslora": True},
    "dora": {"method": "lora", "lora.use_dora": True},
    "pissa": {"method": "lora", "lora.init_lora_weights": "pissa"},
    "lora+": {"method": "lora", "training.loraplus_lr_ratio": 16.0},
    "lora-matched": {"method": "lora"},
    "full": {"method": "full"},
    "lora-over": {"method": "lora-over"},
}
"""What each method sets in a recipe; `lora-matched` also takes the rank that has as many numbers as the cores."""

PLAIN = ("lora", "lora-matched")
"""Methods that train plain A and B: the best of them is what the others are compared with."""


@dataclass(frozen=True, eq=False)
class Run:
    """One training run.

    Args:
        task: name of its recipe.
        method: as the user named it, settings included.
        recipe: with all that the run needs.
    """

    task: str
    method: str
    rate: float
    seed: int
    recipe: Recipe

    @property
    def folder(self) -> Path:
        """Below the study's own."""
        return Path("runs") / self.task / _slug(self.method) / f"lr-{self.rate:g}" / f"seed-{self.seed}"


def make_grid(
    recipes: Sequence[str], rates: Mapping[str, Sequence[float]], seeds: int, settings: dict[str, Any]
) -> list[Run]:
    """Every combination; all of one seed come before the next, so that a study that is stopped has whole seeds.

    Args:
        rates: learning rates of each method. Methods are names of `METHODS`, with settings as in
            "lora-over:decomposition=svd:schedule=dynamic"; those of lora-over are keys of `over`, those of the others
            keys of `lora`.
        settings: recipe keys that all runs share.
    Raises:
        ConfigError: an unknown method, or a recipe that does not take a setting.
    """
    own = {(recipe, method): _settings(recipe, method, settings) for recipe in recipes for method in rates}
    runs = []
    for seed in range(seeds):
        for (recipe, method), chosen in own.items():
            for rate in rates[method]:
                values = settings | chosen | {"training.learning_rate": rate, "training.seed": seed}
                runs.append(Run(Path(recipe).stem, method, rate, seed, load_recipe(recipe, values)))
    return runs


def _settings(recipe: str, method: str, shared: dict[str, Any]) -> dict[str, Any]:
    name, *own = method.split(":")
    if name not in METHODS:
        raise ConfigError(f"--methods: {name!r} is none of {', '.join(METHODS)}.")
    part = "over" if name == "lora-over" else "lora"
    given = {f"{part}.{key}": value for key, value in map(parse_override, own)}
    if name == "lora-matched":
        given["lora.r"] = matched_rank(load_recipe(recipe, shared))
    return METHODS[name] | given


def matched_rank(recipe: Recipe) -> int:
    """The smallest rank at which a plain LoRA has at least as many numbers as the recipe's cores."""
    from peft import LoraConfig, get_peft_model

    from loraover.sites import find_sites

    options = recipe.lora.model_dump() | {"init_lora_weights": False}
    model = get_peft_model(load_skeleton(resolve_model(recipe.model)), LoraConfig(**options))
    sites = find_sites(model)
    decomposition = recipe.over.make_decomposition()
    cores = sum(decomposition.num_parameters(*site.shape) for site in sites.values())
    matrices = sum(site.parameter.numel() for site in sites.values())
    return -(-recipe.lora.r * cores // matrices)


def _slug(method: str) -> str:
    return re.sub(r"[^A-Za-z0-9.+=-]+", "_", method)
