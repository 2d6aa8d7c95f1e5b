"""Request of `loraover train`: a recipe, and values in place of some of its keys."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loraover.adapters.uniform.request_fields import records
from loraover.common.request import AnyName, AnyPath, Request, argument, option
from loraover.sources.hub import keeps_private, pushes


def values_by_key(description: str, flag: str = "--set", **more: Any) -> Any:
    """Declare a field of values by key, such as `settings`: values of recipe keys, by dotted key."""

    def as_texts(values: Mapping[str, Any]) -> list[str]:
        return [f"{key}={json.dumps(value)}" for key, value in values.items()]

    form: dict[str, Any] = {"metavar": "KEY=VALUE", "converts": _by_key, "writes": as_texts}
    return option(description, default=None, flag=flag, **form, **more)


def ray_address(work: str) -> Any:
    """Declare the field `ray`: the cluster to which work is given."""
    description = f"Address of a Ray cluster for {work}, or 'local' for one on this machine."
    return option(description, default=None, is_recorded=False)


def _by_key(given: Mapping[str, Any] | Iterable[str] | None) -> dict[str, Any]:
    if given is None or isinstance(given, Mapping):
        return dict(given or {})
    from loraover.training.recipe import parse_override

    return dict(map(parse_override, given))


KEYS = {
    "method": "method",
    "model": "model",
    "data": "data.train",
    "test_data": "data.test",
    "steps": "training.max_steps",
    "learning_rate": "training.learning_rate",
    "seed": "training.seed",
    "push_to_hub": "push_to_hub",
    "push_model": "push_model",
}
"""Key of the recipe that each field sets, in place of the recipe's value."""


@dataclass(frozen=True)
class TrainRequest(Request):
    """Train an adapter with the settings of RECIPE.

    RECIPE is the name of a recipe that ships (see `loraover recipes`), or a YAML file. Without one, `--data` and
    `--model` train for one epoch with the defaults of docs/recipes.md, and the run keeps the recipe that it used.
    """

    verb = "loraover train"
    extra = "train"
    examples = (
        "loraover train demo",
        "loraover train --data chats.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct",
        "loraover train gsm8k-smollm2 --method lora --learning-rate 1e-3 -o runs/plain",
        "loraover train demo --set over.decomposition=svd --set over.options={} --plan",
        "loraover train recipe.yaml --plan --gpus 8 --gpu-memory 80",
        "loraover train demo --resume",
        "loraover train demo -o runs/demo --resume auto",
        "loraover train demo --ray local --workers 2",
    )
    json_help = "Print the result, or the plan, as JSON."

    recipe: AnyName | None = argument(
        "Name of a recipe that ships (see `loraover recipes`), or a YAML file; without one, `--model` and `--data` are "
        "needed, and the run keeps the recipe that it used.",
        default=None,
    )
    output: AnyPath | None = option(
        "New folder for the run.",
        default=None,
        default_text="runs/RECIPE-N with the first free number N; with --resume, the newest unfinished run of the "
        "recipe there",
        short="-o",
    )
    method: str | None = option(
        "Method: plain LoRA, LoRA-Over, all weights (full), or one of docs/research/methods.md.",
        default=None,
        default_text="the recipe's",
        metavar="NAME",
    )
    model: AnyName | None = option("Base model: folder or hub name.", default=None, default_text="the recipe's")
    data: AnyName | None = option(
        "Training data: JSONL, CSV or parquet file, folder, hub name, or 'word-problems' (built in).",
        default=None,
        default_text="the recipe's",
    )
    test_data: AnyName | None = option(
        "Held-out data: JSONL, CSV or parquet file, folder, hub name, or 'word-problems' (built in).",
        default=None,
        default_text="the recipe's",
    )
    skip_bad_rows: bool = option(
        "Leave out rows that cannot be read or learned, and count them in the result.", default=False
    )
    steps: int | None = option("Number of optimizer steps.", default=None, default_text="the recipe's steps or epochs")
    learning_rate: float | None = option("Peak learning rate.", default=None, default_text="the recipe's")
    seed: int | None = option(
        "Seed of weights, data order and built-in data.", default=None, default_text="the recipe's"
    )
    settings: Mapping[str, Any] | None = values_by_key(
        "Value of any other key of the recipe, such as training.weight_decay=0.01."
    )
    push_to_hub: str | None = pushes("the plain LoRA")
    private: bool = keeps_private(needs=None)
    push_checkpoint: bool = option(
        "Upload the cores too, to the repository's folder checkpoint, so that others can fold them again.",
        default=False,
    )
    push_model: AnyName | None = option(
        "Hub name of the base model, which the uploaded adapter names, if the run trains on a local copy of it.",
        default=None,
        default_text="the recipe's",
    )
    record: bool = records("the adapter")
    resume: str | None = option(
        "Continue the run in the output folder from its last complete checkpoint. With begun, or without a value, "
        "there has to be one; with auto, a new run begins if there is none, for launchers that repeat their command.",
        default=None,
        default_text="begin a new run",
        choices=("begun", "auto"),
        alone="begun",
        is_recorded=False,
    )
    ray: str | None = ray_address("the run")
    workers: int | None = option(
        "Number of Ray workers, which are the processes of the run.",
        default=None,
        default_text="1",
        least=1,
        needs="ray",
        is_recorded=False,
    )
    plan: bool = option(
        "Print the memory, time, steps and tokens that the run would need, after a few steps on random weights.",
        default=False,
    )
    html: AnyPath | None = option(
        "New .html file for the plan, with a histogram of the lengths of the examples.", default=None, needs="plan"
    )

    gpus: int | None = option(
        "Number of GPUs that the plan is for, with a process on each; they need not be here.",
        default=None,
        default_text="one, or this machine",
        least=1,
        needs="plan",
    )
    gpu_memory: float | None = option(
        "Memory of each of these GPUs, in GB.", default=None, default_text="that of a GPU here", needs="plan"
    )

    @property
    def overrides(self) -> dict[str, Any]:
        """Values in place of the recipe's, by dotted key."""
        given = {key: getattr(self, name) for name, key in KEYS.items() if getattr(self, name) is not None}
        flags = {"push_checkpoint": self.push_checkpoint, "training.hub_private_repo": self.private}
        flags["data.skip_bad_rows"] = self.skip_bad_rows
        return given | {key: True for key, is_set in flags.items() if is_set} | dict(self.settings or {})
