"""Defaults of a recipe's keys, which the digest of a run leaves out."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from loraover.overparam.config import Budget
from loraover.training.recipe import Recipe

PINNED: dict[str, dict[str, Any]] = {
    "Recipe": {
        "description": "",
        "model_revision": None,
        "method": "lora-over",
        "trainer": None,
        "reward_funcs": [],
        "diagnostics": False,
        "verify_rollouts": False,
        "push_to_hub": None,
        "push_checkpoint": False,
        "push_model": None,
    },
    "Data": {
        "test": None,
        "subset": None,
        "train_split": "train",
        "test_split": "test",
        "revision": None,
        "format": "auto",
        "keep": {},
        "skip_bad_rows": False,
        "chat": None,
        "streaming": False,
        "train_examples": None,
        "test_examples": None,
    },
    "Distributed": {"engine": "ddp", "config": None, "processes": None},
    "ModelInit": {"dtype": "auto", "attn_implementation": None, "quantization": None},
    "LoraSettings": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": "all-linear",
        "target_parameters": None,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "start_from": None,
    },
    "LoraOverConfig": {
        "decomposition": "mpo",
        "options": {},
        "sites": ["*"],
        "schedule": "all",
        "score": "fisher",
        "budget": None,
        "quota": "matrix",
        "rounds": 3,
        "start": 0.1,
        "end": 0.5,
        "calibration_batches": 4,
        "calibration_steps": 8,
        "carry_moments": True,
        "aux_lr_scale": 1.0,
        "decay_auxiliary": False,
        "seed": None,
    },
    "SomaSettings": {"frozen_blocks": None, "weight_decay": 0.05, "final_weight_decay": 1e-05},
    "LoraScSettings": {"stages": 3, "pace": 0.8, "noise": 0.15, "rank": None},
    "FederatedSettings": {
        "clients": 4,
        "local_steps": 1,
        "clip": 1.0,
        "noise_multiplier": 1.0,
        "epsilon": None,
        "delta": 1e-05,
        "noise_seed": None,
    },
    "TensorGuideSettings": {"tt_rank": 8, "cores": 4, "input_seed": None},
    "Training": {
        "max_steps": None,
        "num_train_epochs": None,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": None,
        "lr_scheduler_type": "cosine",
        "warmup_steps": None,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "optim_args": None,
        "loraplus_lr_ratio": None,
        "max_length": None,
        "bf16": None,
        "fp16": False,
        "gradient_checkpointing": False,
        "seed": 0,
        "logging_steps": 10,
        "save_steps": 50,
        "save_total_limit": 2,
        "report_to": "none",
    },
    "EvaluationSettings": {
        "examples": 200,
        "before": True,
        "exact_match": False,
        "answer": "number",
        "max_new_tokens": 256,
        "batch_size": 16,
    },
    "Budget": {"sites": None, "fraction": None, "parameters": None},
}


def defaults_of(kind: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Default of each key that has one, by class; a part of the recipe is its class's own defaults."""
    own: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, field in kind.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        part = field.annotation
        if isinstance(part, type) and issubclass(part, BaseModel):
            found |= defaults_of(part)
            assert default is None or default == part()
        elif not field.is_required():
            own[name] = default
    return {kind.__name__: own} | found


def test_no_default_has_changed() -> None:
    """A run's digest names only the keys that are not at their defaults, so that a new key leaves kept runs valid."""
    assert defaults_of(Recipe) | defaults_of(Budget) == PINNED, (
        "A changed default needs a new name of the key, or kept runs of studies would be taken for runs with the new "
        "default. A new key, whose default leaves runs as they were, is added to PINNED."
    )
