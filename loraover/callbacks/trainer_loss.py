"""The loss of a trainer whose batches hold no labels, for schedules and bases that run the model."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from loraover.overparam.probe import Loss, check_collated

METRICS = ("_metrics", "_stored_metrics")
"""Attributes in which TRL's trainers collect metrics between logs; the second one in ORPO and CPO."""


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
