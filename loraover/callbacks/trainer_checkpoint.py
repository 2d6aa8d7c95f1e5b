"""Adapters in the Trainer's checkpoints: where they lie, and the cases that the Trainer leaves out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from peft import (
    PeftModel,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments

from loraover.checkpoint.files import TENSORS_FILE
from loraover.checkpoint.peft_adapter import KEY_PREFIX, read_adapter_dir
from loraover.checkpoint.tensor_file import save_tensors
from loraover.checkpoint.training_state import stored_dtypes
from loraover.common.atomic_output import publish_file
from loraover.overparam.sites import base_model_name, find_sites, peft_root

STATE_FILE = "trainer_state.json"


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Return the folder of the Trainer's checkpoint at the present step.

    A trial of `hyperparameter_search` has a folder of its own in the output folder, whose name callbacks are not given:
    it is the one in which the Trainer has written the state of this trial last.
    """
    output, name = Path(args.output_dir), f"checkpoint-{state.global_step}"
    if not state.is_hyper_param_search:
        return output / name
    written = [
        path
        for path in output.rglob(f"{name}/{STATE_FILE}")
        if TrainerState.load_from_json(str(path)).trial_params == state.trial_params
    ]
    return max(written, key=lambda path: path.stat().st_mtime_ns).parent if written else output / name


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
