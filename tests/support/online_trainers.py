"""TRL's online trainers on a tiny Llama, with a stand-in for the engine in which faults are planted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from trl.trainer import grpo_trainer, rloo_trainer

from support.trl_engine import LocalEngine

MODULES = {"GRPO": grpo_trainer, "RLOO": rloo_trainer}
PROMPTS = [f"{31 * n + 100} is" for n in range(24)]


def odd_characters(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs between answers."""
    return [sum(ord(character) % 7 for character in text) / (1 + len(text)) for text in completions]


def odd_answers(completions: list[list[dict[str, str]]], **_: Any) -> list[float]:
    """The same for answers in a chat."""
    return odd_characters([messages[-1]["content"] for messages in completions])


@contextmanager
def planted(
    fault: str = "", *, since: int = 0, dtype: torch.dtype = torch.float32, engine: type[LocalEngine] = LocalEngine
) -> Iterator[type[LocalEngine]]:
    """TRL's trainers get an engine with a fault during the block."""
    kind = type("Planted", (engine,), {"fault": fault, "since": since, "dtype": dtype})
    with pytest.MonkeyPatch.context() as patch:
        for module in MODULES.values():
            patch.setattr(module, "VLLMGeneration", kind)
        yield kind


def online_trainer(kind: str, model: Any, output: Path, *, steps: int = 8, **options: Any) -> Any:
    """A trainer that samples two answers to each of eight prompts at each step."""
    config, trainer = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    given = {key: options.pop(key) for key in ("callbacks", "peft_config", "processing_class") if key in options}
    rows = [{"prompt": prompt} for prompt in options.pop("prompts", PROMPTS)]
    common: dict[str, Any] = {
        "max_steps": steps,
        "logging_steps": 1,
        "bf16": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "use_vllm": True,
        "vllm_mode": "server",
        "max_completion_length": 8,
        "num_generations": 2,
        "per_device_train_batch_size": 16,
        "disable_tqdm": True,
    }
    return trainer(
        str(model) if isinstance(model, Path) else model,
        reward_funcs=odd_characters,
        args=config(str(output), **(common | options)),
        train_dataset=Dataset.from_list(rows),
        **({"peft_config": LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4)} | given),
    )
