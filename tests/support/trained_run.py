"""A finished run of `loraover train`, and what it left."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from loraover.training.run_result import Measures, RunResult, read_run

from support.tiny_models import lora_matrices

MODELS = {"llama": transformers.AutoModelForCausalLM, "t5": transformers.AutoModelForSeq2SeqLM}


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    kind: str
    method: str
    base: Path
    folder: Path
    trainer: Any
    start: dict[str, Tensor]

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def result(self) -> RunResult:
        return read_run(self.folder)

    def load(self, adapter: Path | None = None) -> Any:
        """The base model, with the trained adapter as PEFT reads it."""
        base = MODELS[self.kind].from_pretrained(self.base)
        return PeftModel.from_pretrained(base, str(adapter or self.adapter)).eval()


@contextlib.contextmanager
def watched() -> Iterator[list[tuple[Any, dict[str, Tensor]]]]:
    """Each trainer whose training starts in the block, with A and B at that moment."""
    seen: list[tuple[Any, dict[str, Tensor]]] = []
    train = transformers.Trainer.train

    def watching(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((self, lora_matrices(self.model)))
        return train(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.Trainer, "train", watching)
        yield seen


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metrics(folder) if "loss" in row}


def loss(measures: Measures | None) -> float:
    """The held-out loss of a run that has measured it."""
    assert measures is not None
    return measures.loss


def matrices(folder: Path) -> dict[str, Tensor]:
    """The tensors of a run's adapter."""
    return load_file(folder / "adapter" / "adapter_model.safetensors")
