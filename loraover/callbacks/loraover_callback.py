"""Over-parameterization inside the Hugging Face Trainer and its descendants."""

from __future__ import annotations

import os
import random
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraover.checkpoint.checkpoint import read_checkpoint, restore, write_checkpoint
from loraover.common.errors import CheckpointError
from loraover.overparam.config import LoraOverConfig
from loraover.overparam.importance.base import Loss, Probe, model_loss
from loraover.overparam.parameterization import OverParameterization
from loraover.overparam.schedule import runs_model
from loraover.overparam.sharding import trainable_state_dict, world_size
from loraover.overparam.sites import find_sites, only_adapter


class LoraOverCallback(TrainerCallback):
    """Trains a PEFT model's LoRA matrices through cores; nothing else in a script changes.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[LoraOverCallback()])
        trainer.train()
        model.save_pretrained("adapter")      # a plain LoRA

    Every checkpoint that the Trainer saves becomes a LoRA-Over checkpoint, and a resumed run continues
    with its cores. At the end of training, `output_dir` is one too, whatever the Trainer saves.

    Args:
        config: which matrices, when, and how; an absent seed is the Trainer's.
        resume_from: the checkpoint folder of a resumed run, when it is not `args.resume_from_checkpoint`
            or `<output_dir>/checkpoint-<step>`.
        loss: of the model on one batch, for a schedule that runs the model on some training data; by default the one
            that the model computes from a batch with labels.
    """

    def __init__(
        self,
        config: LoraOverConfig | None = None,
        *,
        resume_from: str | os.PathLike[str] | None = None,
        loss: Loss = model_loss,
    ) -> None:
        self.config = config or LoraOverConfig()
        self.resume_from = resume_from
        self.loss = loss
        self.over: OverParameterization | None = None
        self._logged_rounds = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        only_adapter(find_sites(model).values())
        if self.over is not None:
            self.over.detach()  # of a run that was interrupted, whose optimizer the Trainer has kept
        config = self._seeded(args.seed)
        probe = None
        if runs_model(config):
            batches = calibration_batches(train_dataloader, config.calibration_batches, args.seed, args.device)
            probe = Probe(model, batches, self.loss)
        if state.global_step > 0:
            checkpoint = self._checkpoint(args, state)
            self.over = self.restore(model, checkpoint, args.seed, steps=state.max_steps, probe=probe)
            self._logged_rounds = len(self.over.schedule.rounds)  # the checkpoint's own log tells them
        else:
            self.over = OverParameterization(model, config, steps=state.max_steps, probe=probe)
            self._logged_rounds = 0
        self.over.attach(optimizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.over is None or self.config.schedule == "all":
            return
        for held in self.over.schedule.rounds[self._logged_rounds :]:
            state.log_history.append(
                {
                    "step": state.global_step,
                    "loraover_injected_sites": len(held.chosen),
                    "loraover_added_parameters": held.added,
                    "loraover_scores": held.ranked,
                }
            )
        self._logged_rounds = len(self.over.schedule.rounds)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.over is None or not args.should_save:
            return
        self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}", step=state.global_step)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if self.over is None:
            return
        assert model is not None
        step = state.global_step
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.over.detach()  # the model holds the best checkpoint's matrices by now, of which that has the cores
            self.restore(model, state.best_model_checkpoint, args.seed, steps=state.max_steps)
            step = state.best_global_step or step
        else:
            self.over.finish()
        self._leave_checkpoint(args, model, step)

    def _leave_checkpoint(self, args: TrainingArguments, model: nn.Module, step: int) -> None:
        """Write the adapter and its cores into the Trainer's own folder, for a fold with a certificate.

        Only of a PeftModel: others would write all of their weights, or cannot write themselves.
        """
        if self.over is None or not isinstance(model, PeftModel):
            return
        weights = trainable_state_dict(model) if world_size() > 1 else None  # in every process
        if args.should_save:
            adapter = only_adapter(self.over.sites.values())
            model.save_pretrained(args.output_dir, state_dict=weights, selected_adapters=[adapter])
            self.save(args.output_dir, step=step)

    def save(self, directory: str | os.PathLike[str], *, step: int) -> None:
        """Add the cores to a folder that `model.save_pretrained` has written."""
        assert self.over is not None, "nothing was trained"
        adapter = only_adapter(self.over.sites.values())
        write_checkpoint(_adapter_folder(directory, adapter), self.over, step=step, adapter=adapter)

    def restore(
        self,
        model: nn.Module,
        checkpoint: str | os.PathLike[str],
        seed: int,
        *,
        steps: int | None = None,
        probe: Probe | None = None,
    ) -> OverParameterization:
        """Take the cores of a checkpoint whose adapter `model` has loaded.

        Args:
            seed: the run's own, for a configuration without one.
            steps: of the whole run, if it goes on.
            probe: batches, likewise.

        Raises:
            CheckpointError: see `loraover.checkpoint.checkpoint.restore`.
        """
        self.over = OverParameterization(model, self._seeded(seed), steps=steps, probe=probe, inject=False)
        adapter = only_adapter(self.over.sites.values())
        restore(self.over, read_checkpoint(_adapter_folder(checkpoint, adapter)))
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


def _adapter_folder(directory: str | os.PathLike[str], adapter: str) -> Path:
    """Where `model.save_pretrained(directory)` puts an adapter."""
    return Path(directory) if adapter == "default" else Path(directory) / adapter


def calibration_batches(dataloader: Any, count: int, seed: int, device: Any) -> list[Any]:
    """Batches of training data, drawn by the seed; neither the loader's state nor the random state changes.

    Args:
        dataloader: of the Trainer, whose dataset and collator are used.
        device: to put tensors on.
    """
    size = getattr(dataloader.batch_sampler, "batch_size", None) or dataloader.batch_size or 1
    dataset = dataloader.dataset
    with torch.random.fork_rng(devices=[]):  # a dataset may draw crops, a collator masks
        if hasattr(dataset, "__len__"):
            chosen = random.Random(seed).sample(range(len(dataset)), min(count * size, len(dataset)))
            rows = [dataset[i] for i in chosen]
        else:
            rows = list(islice(iter(dataset), count * size))
        batches = [dataloader.collate_fn(rows[i : i + size]) for i in range(0, len(rows), size)]
    return [send_to_device(batch, device) for batch in batches]
