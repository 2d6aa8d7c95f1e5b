"""Over-parameterization inside the Hugging Face Trainer and its descendants."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraover.checkpoint import read_checkpoint, restore, write_checkpoint
from loraover.config import LoraOverConfig
from loraover.errors import CheckpointError
from loraover.overparam import OverParameterization


class LoraOverCallback(TrainerCallback):
    """Trains a PEFT model's LoRA matrices through cores; nothing else in a script changes.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[LoraOverCallback()])
        trainer.train()
        model.save_pretrained("adapter")      # a plain LoRA

    Every checkpoint that the Trainer saves becomes a LoRA-Over checkpoint, and a resumed run continues
    with its cores.

    Args:
        config: which matrices, and how; an absent seed is the Trainer's.
        resume_from: the checkpoint folder of a resumed run, when it is not `args.resume_from_checkpoint`
            or `<output_dir>/checkpoint-<step>`.
    """

    def __init__(
        self, config: LoraOverConfig | None = None, *, resume_from: str | os.PathLike[str] | None = None
    ) -> None:
        self.config = config or LoraOverConfig()
        self.resume_from = resume_from
        self.over: OverParameterization | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        if state.global_step > 0:
            self.over = self.restore(model, self._checkpoint(args, state), args.seed)
        else:
            self.over = OverParameterization(model, self._seeded(args.seed))
        self.over.attach(optimizer)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.over is None or not args.should_save:
            return
        self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}", step=state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.over is not None:
            self.over.fold()

    def save(self, directory: str | os.PathLike[str], *, step: int) -> None:
        """Add the cores to a folder that `model.save_pretrained` has written, each adapter to its own."""
        assert self.over is not None, "nothing was trained"
        for adapter in dict.fromkeys(self.over.sites[name].adapter for name in self.over.injected):
            folder = Path(directory) if adapter == "default" else Path(directory) / adapter
            write_checkpoint(folder, self.over, step=step, adapter=adapter)

    def restore(self, model: nn.Module, checkpoint: str | os.PathLike[str], seed: int) -> OverParameterization:
        """Take the cores of a checkpoint whose adapter `model` has loaded.

        Args:
            seed: the run's own, for a configuration without one.
        Raises:
            CheckpointError: see `loraover.checkpoint.restore`.
        """
        self.over = OverParameterization(model, self._seeded(seed), inject=False)
        restore(self.over, read_checkpoint(checkpoint))
        return self.over

    def _seeded(self, seed: int) -> LoraOverConfig:
        return self.config if self.config.seed is not None else self.config.model_copy(update={"seed": seed})

    def _checkpoint(self, args: TrainingArguments, state: TrainerState) -> Path:
        named = self.resume_from or args.resume_from_checkpoint
        step = f"checkpoint-{state.global_step}"
        folder = Path(named) if isinstance(named, str | os.PathLike) else Path(args.output_dir) / step
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: the run was resumed at step {state.global_step}, but its cores are not there; "
                "name the folder with LoraOverCallback(resume_from=...)."
            )
        return folder
