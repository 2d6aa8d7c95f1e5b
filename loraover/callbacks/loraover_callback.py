"""Over-parameterisation inside the Hugging Face Trainer and its descendants."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from peft import (
    PeftModel,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraover.callbacks.calibration import calibration_batches
from loraover.callbacks.seal_checkpoints import checkpoint_folder
from loraover.checkpoint.checkpoint import read_checkpoint
from loraover.checkpoint.files import TENSORS_FILE
from loraover.checkpoint.peft_adapter import KEY_PREFIX, read_adapter_dir
from loraover.checkpoint.tensor_file import save_tensors
from loraover.checkpoint.training_state import restore, stored_dtypes, write_checkpoint
from loraover.common.atomic_output import publish_file
from loraover.common.errors import CheckpointError
from loraover.overparam.config import LoraOverConfig
from loraover.overparam.eigenbases import with_measured_bases
from loraover.overparam.optimizers import ordinary_optimizer
from loraover.overparam.parameterization import OverParameterization
from loraover.overparam.probe import Loss, Probe, model_loss
from loraover.overparam.schedule import runs_model
from loraover.overparam.sharding import is_sharded, trainable_state_dict
from loraover.overparam.sites import base_model_name, find_sites, only_adapter, peft_root


class LoraOverCallback(TrainerCallback):
    """Callback by which the Hugging Face Trainer, or a trainer derived from it, trains LoRA matrices through cores.

    It is the only change that a script needs. Every checkpoint that the Trainer saves also holds the cores, so that a
    resumed run continues with them. At the end of training, the adapter and its cores are written to `output_dir`,
    even if the Trainer saves no checkpoints. In a trial of `hyperparameter_search`, they are written to the trial's
    folder, which exists if the Trainer saves checkpoints.

    Args:
        config: Which matrices get cores, when, and of which decomposition; the defaults of `LoraOverConfig` if absent.
            Without a seed in it, the Trainer's seed is used.
        resume_from: Folder of the checkpoint to resume from, if it is neither `args.resume_from_checkpoint` nor
            `<output_dir>/checkpoint-<step>`.
        loss: Function of the model and a batch that returns the mean loss, for schedules that run the model on
            training data; by default the model's own loss, from a batch with labels.

    Attributes:
        config: The configuration that was given.
        loss: The loss that was given. Where batches hold no labels, set it to `trainer_loss(trainer)`.
        over: The `OverParameterization` of the present or last run; None before the first.

    Example:
        ```python
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

        from loraover import LoraOverCallback

        base = "HuggingFaceTB/SmolLM2-135M-Instruct"
        tokens = AutoTokenizer.from_pretrained(base)("2 + 2 = 4")["input_ids"]
        data = [{"input_ids": tokens, "labels": tokens}]
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules="all-linear"))
        args = TrainingArguments("run", max_steps=4)
        trainer = Trainer(model, args, train_dataset=data, callbacks=[LoraOverCallback()])
        trainer.train()
        model.save_pretrained("adapter")  # an ordinary LoRA adapter
        ```
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
        self._saved_into: Path | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the model's matrices cores, or restore those of the checkpoint, and attach the optimizer."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        only_adapter(find_sites(model).values())
        self._saved_into = None
        if self.over is not None:
            self.over.detach()  # an interrupted run has left it attached, and the Trainer has kept the optimizer
        config = _seeded(with_measured_bases(self.config, ordinary_optimizer(optimizer)), args.seed)
        probe = None
        if runs_model(config):
            batches = calibration_batches(
                kwargs["train_dataloader"], config.calibration_batches, args.seed, args.device
            )
            probe = Probe(model, batches, self.loss)
        if state.global_step > 0:
            named = self.resume_from or args.resume_from_checkpoint
            checkpoint = Path(named) if isinstance(named, str | os.PathLike) else checkpoint_folder(args, state)
            if not checkpoint.is_dir():
                raise CheckpointError(
                    f"{checkpoint}: the run was resumed at step {state.global_step}, but its cores are not there; "
                    "name the folder with LoraOverCallback(resume_from=...)."
                )
            self.over = self.restore(model, checkpoint, args.seed, steps=state.max_steps, probe=probe, config=config)
            self._logged_rounds = len(self.over.schedule.rounds)  # the checkpoint's log has them already
        else:
            self.over = OverParameterization(model, config, steps=state.max_steps, probe=probe)
            self._logged_rounds = 0
        self.over.attach(optimizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add new decisions of the schedule to the Trainer's log history."""
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
        """Add the cores to the checkpoint that the Trainer has saved, and the adapter if it has saved other files."""
        if self.over is None:
            return
        model, folder = kwargs["model"], checkpoint_folder(args, state)
        self._saved_into = folder.parent
        if self._is_sharded or not isinstance(model, PeftModel):
            self._save_all(args, model, folder, state.global_step)
        elif args.should_save:
            self.save(folder, step=state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the training of cores, and write the adapter and its cores to the output folder."""
        if self.over is None:
            return
        model, step = kwargs["model"], state.global_step
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.over.detach()  # the model now holds the best checkpoint's matrices, whose cores are in that checkpoint
            checkpoint = state.best_model_checkpoint
            load_best(model, Path(checkpoint), only_adapter(self.over.sites.values()))
            self.restore(model, checkpoint, args.seed, steps=state.max_steps, config=self.over.config)
            step = state.best_global_step or step
        else:
            self.over.finish()
        output = self._saved_into if state.is_hyper_param_search else Path(args.output_dir)
        if output is not None:
            self._save_all(args, model, output, step)

    @property
    def _is_sharded(self) -> bool:
        """Whether the model holds only this process's part of the matrices; also if it is the only process."""
        return self.over is not None and any(is_sharded(site.parameter) for site in self.over.sites.values())

    def _save_all(self, args: TrainingArguments, model: nn.Module, folder: Path, step: int) -> None:
        """Write the adapter and its cores into a folder, from which they can be folded."""
        assert self.over is not None
        weights = trainable_state_dict(peft_root(model)) if self._is_sharded else None  # in every process
        if args.should_save:
            save_adapter(model, folder, only_adapter(self.over.sites.values()), weights)
            self.save(folder, step=step)

    def save(self, directory: str | os.PathLike[str], *, step: int) -> None:
        """Add the cores to a folder that `model.save_pretrained` has written.

        Args:
            directory: Folder that `model.save_pretrained` has written.
            step: Number of optimizer steps taken, which the checkpoint records.

        Raises:
            CheckpointError: The folder holds no adapter in safetensors.
            ConfigError: A matrix was changed outside the optimizer step.
            OutputError: The files cannot be written.
        """
        assert self.over is not None, "nothing was trained"
        adapter = only_adapter(self.over.sites.values())
        write_checkpoint(adapter_folder(Path(directory), adapter), self.over, step=step, adapter=adapter)

    def restore(
        self,
        model: nn.Module,
        checkpoint: str | os.PathLike[str],
        seed: int,
        *,
        steps: int | None = None,
        probe: Probe | None = None,
        config: LoraOverConfig | None = None,
    ) -> OverParameterization:
        """Restore the cores of a checkpoint whose adapter the model has loaded.

        Args:
            model: PEFT model that holds the checkpoint's adapter.
            checkpoint: Folder of the checkpoint.
            seed: Seed to use if the configuration has none.
            steps: Number of optimizer steps of the run, if training continues.
            probe: Batches on which a schedule runs the model, if training continues.
            config: Configuration of the run, if its optimizer has changed the callback's.

        Returns:
            The restored cores, also in the attribute `over`.

        Raises:
            CheckpointError: The checkpoint cannot be trusted, or does not fit the model or the configuration.
            ConfigError: Several adapters are trained.
        """
        config = _seeded(config or self.config, seed)
        self.over = OverParameterization(model, config, steps=steps, probe=probe, inject=False)
        adapter = only_adapter(self.over.sites.values())
        restore(self.over, read_checkpoint(adapter_folder(Path(checkpoint), adapter)))
        return self.over


def _seeded(config: LoraOverConfig, seed: int) -> LoraOverConfig:
    return config if config.seed is not None else config.model_copy(update={"seed": seed})


def adapter_folder(directory: Path, adapter: str) -> Path:
    """Return the folder in which `model.save_pretrained(directory)` puts an adapter."""
    return directory if adapter == "default" else directory / adapter


def save_adapter(model: nn.Module, directory: Path, adapter: str, weights: dict[str, Tensor] | None) -> None:
    """Save an adapter of any model as `PeftModel.save_pretrained` does; `weights` replace the state dict."""
    root: Any = peft_root(model)
    if isinstance(root, PeftModel):
        root.save_pretrained(str(directory), state_dict=weights, selected_adapters=[adapter])
        return
    folder = adapter_folder(directory, adapter)
    config = copy.copy(root.peft_config[adapter])
    config.inference_mode, config.base_model_name_or_path = True, base_model_name(root)
    config.save_pretrained(str(folder))
    found = get_peft_model_state_dict(root, weights, adapter)
    tensors = {f"{KEY_PREFIX}{key}": value.contiguous() for key, value in found.items()}
    publish_file(folder / TENSORS_FILE, lambda draft: save_tensors(tensors, draft))


def load_best(model: nn.Module, directory: Path, adapter: str) -> None:
    """Put the adapter of the Trainer's best checkpoint into a PeftModel, as it was evaluated.

    The Trainer does not find an adapter that is not named "default", and PEFT widens 16-bit matrices to float32 when it
    loads one. Any other model, and one that is sharded, holds what the Trainer has loaded into it.
    """
    sites = find_sites(model)
    if not isinstance(model, PeftModel) or any(site.is_cut for site in sites.values()):
        return
    folder = adapter_folder(directory, adapter)
    dtypes = stored_dtypes(read_adapter_dir(folder), [site.path for site in sites.values()])
    for site in sites.values():
        site.parameter.data = site.parameter.data.to(dtypes[site.path])
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), adapter_name=adapter)
