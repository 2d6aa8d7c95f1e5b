"""Checkpoints of eigen, one for each kind of bases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraover import LoraOverConfig

from support.make_checkpoint import Made, make_checkpoint

OPTIONS: dict[str, dict[str, Any]] = {
    "gradient": {"block": 12},
    "calibration": {"short": "calibration", "long": "calibration", "block": 12},
    "both": {"long": "calibration", "block": 12, "growth": 1, "refresh": 2},
    "carried": {"second_moments": "carried", "growth": 1},
    "trained": {"short": "calibration", "long": "calibration", "train_auxiliary": True},
    "once": {"growth": None, "refresh": 3},
    "neither": {"short": "none", "long": "none"},
}
QKVO = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
CORE = "model.layers.0.self_attn.q_proj.lora_A"
V, OUT, B = (f"model.layers.0.self_attn.{rest}" for rest in ("v_proj.lora_A", "o_proj.lora_A", "q_proj.lora_B"))


def made_of(folder: Path, kind: str, **options: Any) -> Made:
    config = LoraOverConfig(decomposition="eigen", options=OPTIONS[kind], seed=5)
    return make_checkpoint(folder, config=config, **({"steps": 3} | QKVO | options))
