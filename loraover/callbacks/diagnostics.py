"""What the adapter and its cores do while they train, as numbers beside the loss; off unless asked."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraover.callbacks.loraover_callback import LoraOverCallback
from loraover.callbacks.step_norm import Factors, factors, step_norm
from loraover.overparam.parameterization import OverParameterization

PREFIX = "loraover/"


@torch.no_grad()
def core_numbers(over: OverParameterization) -> dict[str, float]:
    """Norms of centre and auxiliary cores, the worst condition number of the gauge, and added parameters.

    The gauge is the auxiliary cores' contraction left and right of the centre; its condition is 1 at injection, and
    NaN once a run has diverged.
    """
    centre = auxiliary = 0.0
    conditions = [1.0]
    for group in over.groups:
        for k, stack in enumerate(group.stacks):
            square = float(stack.cpu().double().square().sum())
            centre, auxiliary = (centre + square, auxiliary) if k == group.centre else (centre, auxiliary + square)
        for frame in group.decomposition.frames(group.stacks, *group.shape):
            conditions.append(_condition(frame.cpu().double()))
    cores, matrices = over.num_parameters()
    everything = sum(site.parameter.numel() for site in over.sites.values())
    return {
        "centre_norm": math.sqrt(centre),
        "auxiliary_norm": math.sqrt(auxiliary),
        "gauge_condition": float(torch.tensor(conditions, dtype=torch.float64).max()),  # unlike max, NaN if one is
        "injected_sites": len(over.injected),
        "added_parameters": cores - matrices,
        "added_share": (cores - matrices) / everything,
    }


def _condition(frame: Tensor) -> float:
    """The largest ratio of extreme singular values; NaN where a matrix is not finite, which PyTorch refuses."""
    if not bool(frame.isfinite().all()):
        return math.nan
    values = torch.linalg.svdvals(frame)
    return float((values[:, 0] / values[:, -1]).max())


def _log_folder(args: TrainingArguments) -> Path:
    """Where the Trainer's own TensorBoard callback, which comes first, has begun to write."""
    if named := os.environ.get("TENSORBOARD_LOGGING_DIR"):
        return Path(named)
    runs = Path(args.output_dir) / "runs"
    return max((p for p in runs.glob("*") if p.is_dir()), key=lambda p: p.stat().st_mtime, default=runs)


def _may_log(args: TrainingArguments, state: TrainerState, step: int) -> bool:
    """Whether the Trainer logs after that step, as far as can be told before it."""
    if args.logging_strategy == "steps":
        is_first = step == 1 and args.logging_first_step
        return bool(is_first or step % max(1, int(state.logging_steps)) == 0)
    return bool(args.logging_strategy == "epoch")


class DiagnosticsCallback(TrainerCallback):
    """Adds numbers to what the Trainer logs: `trainer_state.json`, and TensorBoard where the Trainer reports to it.

    For plain LoRA, too: `loraover/step_norm` is the size of the logged step in the space of scaling * B A, so that a
    better method can be told from a larger step. The rest is about the cores. `logging_strategy="epoch"` costs a copy
    of A and B at every step: which one ends the epoch is not known before it.

    Args:
        over: the callback that trains with cores; None for plain LoRA. Put this one behind it.
    """

    def __init__(self, over: LoraOverCallback | None = None) -> None:
        self._over = over
        self._before: dict[str, Factors] | None = None
        self._writer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if "tensorboard" in args.report_to and state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(_log_folder(args))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._before = factors(model) if _may_log(args, state, state.global_step + 1) else None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._before is None or logs is None or "loss" not in logs:
            return
        numbers = {"step_norm": step_norm(self._before, factors(model))}
        if self._over is not None and self._over.over is not None:
            numbers |= core_numbers(self._over.over)
        named = {PREFIX + name: value for name, value in numbers.items()}
        logs.update(named)
        state.log_history[-1].update(named)
        if self._writer is not None:
            for name, value in named.items():
                self._writer.add_scalar(name, value, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._writer is not None:
            self._writer.close()
