"""Batches on which the model is run before training, and the trainer's loss for them."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import IterableDataset

from loraover.common.errors import ConfigError
from loraover.overparam.probe import Loss, check_collated, seeded

METRICS = ("_metrics", "_stored_metrics")
"""Attributes in which TRL's trainers collect metrics between logs; the second one in ORPO and CPO."""


def calibration_batches(dataloader: Any, count: int, seed: int, device: Any) -> list[Any]:
    """Draw up to `count` batches of training data without changing the data loader's state or the random state."""
    size = getattr(dataloader.batch_sampler, "batch_size", None) or dataloader.batch_size or 1
    dataset = dataloader.dataset
    with seeded(seed, []):  # a dataset may draw crops, a collator masks
        if hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset):
            chosen = random.Random(seed).sample(range(len(dataset)), min(count * size, len(dataset)))
            rows = [dataset[i] for i in chosen]
        else:
            rows = list(islice(iter(dataset), count * size))
            with seeded(seed, []):
                again = list(islice(iter(dataset), 1))
            if not _same(rows[:1], again):
                raise ConfigError(
                    f"the training data, a {type(dataset).__name__}: calibration reads its first {len(rows)} rows "
                    "before training, but a second pass over the data begins with another row, so training would get "
                    "other rows. Use a stream that gives the same rows in the same order in every pass, or a data set "
                    "with a length and an index; or choose a schedule and options that need no calibration."
                )
        batches = [dataloader.collate_fn(rows[i : i + size]) for i in range(0, len(rows), size)]
    return [send_to_device(batch, device) for batch in batches]


def _same(one: Any, other: Any) -> bool:
    """Whether two rows are equal; rows that cannot be compared count as equal."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    equality: Any = type(one).__eq__
    return equality is object.__eq__ or bool(one == other)


def trainer_loss(trainer: Any) -> Loss:
    """Return a trainer's own loss as a function of a model and a batch, which leaves no trace in the trainer's logs.

    TRL's trainers count tokens and collect metrics whenever they compute a loss. A copy of the trainer does so here.

    Args:
        trainer: Trainer of transformers or TRL with a `compute_loss`.

    Example:
        ```python
        from datasets import Dataset
        from peft import LoraConfig
        from trl import DPOConfig, DPOTrainer

        from loraover import Budget, LoraOverCallback, LoraOverConfig, trainer_loss

        callback = LoraOverCallback(LoraOverConfig(schedule="static", budget=Budget(fraction=0.25)))
        trainer = DPOTrainer(
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            args=DPOConfig("run", max_steps=4, bf16=False),  # True on a GPU
            train_dataset=Dataset.from_list([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}]),
            peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[callback],
        )
        callback.loss = trainer_loss(trainer)
        trainer.train()
        ```
    """

    def loss(model: Any, batch: Any) -> Tensor:
        check_collated(batch)
        apart = copy.copy(trainer)  # whose counts of tokens are numbers of its own
        held = vars(trainer)
        vars(apart).update({name: copy.deepcopy(held[name]) for name in METRICS if name in held})
        found: Tensor = apart.compute_loss(model, batch)
        return found

    return loss
