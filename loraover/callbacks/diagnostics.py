"""Optional measurements of the adapter and its cores during training, logged beside the loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraover.callbacks.loraover_callback import LoraOverCallback
from loraover.callbacks.step_norm import Factors, factors, step_norm
from loraover.overparam.parameterization import OverParameterization

PREFIX = "loraover/"


@torch.no_grad()
def core_numbers(over: OverParameterization) -> dict[str, float]:
    """Measure norms of centre and auxiliary cores, the worst condition number of the gauge, and added parameters.

    The gauge is the contraction of the auxiliary cores left and right of the centre. Its condition number is 1 when the
    cores are made, and NaN once a run has diverged.
    """
    centre = auxiliary = 0.0
    conditions = [1.0]
    for group in over.groups:
        for k, stack in enumerate(group.stacks):
            square = float(stack.cpu().double().square().sum())
            centre, auxiliary = (centre + square, auxiliary) if k == group.centre else (centre, auxiliary + square)
        for frame in group.decomposition.frames(group.stacks, *group.shape):
            wide = frame.cpu().double()
            if bool(wide.isfinite().all()):
                values = torch.linalg.svdvals(wide)
                conditions.append(float((values[:, 0] / values[:, -1]).max()))
            else:  # which PyTorch refuses
                conditions.append(math.nan)
    cores, matrices = over.num_parameters()
    everything = sum(site.size for site in over.sites.values())
    return {
        "centre_norm": math.sqrt(centre),
        "auxiliary_norm": math.sqrt(auxiliary),
        "gauge_condition": float(torch.tensor(conditions, dtype=torch.float64).max()),  # unlike max, NaN if one is
        "injected_sites": len(over.injected),
        "added_parameters": cores - matrices,
        "added_share": (cores - matrices) / everything,
    }


class DiagnosticsCallback(TrainerCallback):
    """Callback that adds measurements to what the Trainer logs and reports: to trackers, and in `trainer_state.json`.

    `loraover/step_norm` is the Frobenius norm by which the logged step changes scaling * B A, over all modules. It
    exists for plain LoRA too, and shows whether one method only takes larger steps than another. The other values are
    norms of the cores, the condition number of the gauge (the contraction of the auxiliary cores), and the number of
    sites and parameters added.

    With `logging_strategy="epoch"`, A and B are copied at every step, since the last step of an epoch is not known
    before it is taken.

    Args:
        over: Callback that trains through cores; None for plain LoRA.

    Example:
        ```python
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

        from loraover import DiagnosticsCallback, LoraOverCallback

        base = "HuggingFaceTB/SmolLM2-135M-Instruct"
        tokens = AutoTokenizer.from_pretrained(base)("2 + 2 = 4")["input_ids"]
        data = [{"input_ids": tokens, "labels": tokens}]
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules="all-linear"))
        args = TrainingArguments("run", max_steps=4)
        over = LoraOverCallback()
        trainer = Trainer(model, args, train_dataset=data, callbacks=[over])
        DiagnosticsCallback(over).add_to(trainer)  # in `callbacks`, it would come after the trackers
        trainer.train()
        ```
    """

    def __init__(self, over: LoraOverCallback | None = None) -> None:
        self._over = over
        self._before: dict[str, Factors] | None = None

    def add_to(self, trainer: Trainer) -> None:
        """Add this callback to a trainer, before the callbacks that report what the Trainer logs."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Copy A and B before a step that the Trainer may log, as far as is known before the step."""
        may_log, step = args.logging_strategy == "epoch", state.global_step + 1
        if args.logging_strategy == "steps":
            is_first = step == 1 and args.logging_first_step
            may_log = bool(is_first or step % max(1, int(state.logging_steps)) == 0)
        self._before = factors(kwargs["model"]) if may_log else None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the measurements to what the Trainer logs."""
        logs: dict[str, Any] = kwargs["logs"]
        if self._before is None or "loss" not in logs:
            return
        numbers = {"step_norm": step_norm(self._before, factors(kwargs["model"]))}
        if self._over is not None and self._over.over is not None:
            numbers |= core_numbers(self._over.over)
        named = {PREFIX + name: value for name, value in numbers.items()}
        logs.update(named)
        state.log_history[-1].update(named)
