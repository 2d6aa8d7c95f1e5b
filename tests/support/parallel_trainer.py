"""Runs of a Trainer in each process of torchrun: complete, resumed, with a folder per process, and static.

    torchrun --nproc-per-node 2 tests/support/parallel_trainer.py FOLDER

Each process leaves what it saw in FOLDER/<rank>.pt.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import Trainer, TrainingArguments

from loraover import LoraOverCallback, LoraOverConfig, SealCheckpoints, last_whole_checkpoint

from support.parallel_run import cores
from support.tiny_models import lora_matrices, tiny_llama, token_ids, with_lora

STEPS, MIDDLE = 6, 3
DYNAMIC = LoraOverConfig.model_validate(
    {"schedule": "dynamic", "score": "fisher", "budget": {"sites": 8}, "rounds": 2, "start": 0.3, "end": 0.7}
)
STATIC = LoraOverConfig.model_validate({"schedule": "static", "score": "loss_impact", "budget": {"fraction": 0.5}})
DATA = [{"input_ids": row, "labels": row} for row in token_ids(seed=7, batch=48)]


class Uneven(Trainer):
    """Rank 1 is late with its part of a checkpoint."""

    def _save_rng_state(self, output_dir: str) -> None:
        time.sleep(0.5 * self.args.process_index)
        super()._save_rng_state(output_dir)


def trainer_of(
    folder: Path,
    *,
    rows: int,
    dropout: float = 0.1,
    config: LoraOverConfig = DYNAMIC,
    fsdp_config: dict[str, Any] | None = None,
    deepspeed: dict[str, Any] | None = None,
) -> Any:
    """Two micro-batches a step."""
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="steps",
        save_steps=MIDDLE,
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo" if distributed.is_torchelastic_launched() else None,
        disable_tqdm=True,
        fsdp=fsdp_config is not None,
        fsdp_config=fsdp_config,
        deepspeed=deepspeed,
    )
    model = with_lora(tiny_llama(), task_type="CAUSAL_LM", lora_dropout=dropout)
    return Uneven(model, args, train_dataset=DATA, callbacks=[LoraOverCallback(config), SealCheckpoints()])


def run(folder: Path, resume: Path | None = None, **options: Any) -> dict[str, Any]:
    """Train in this process, and return what it saw of the run."""
    trainer, losses = trainer_of(folder, **options), []
    trainer.model.register_forward_hook(lambda module, args, output: losses.append(output.loss.item()))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    (over,) = [found.over for found in trainer.callback_handler.callbacks if isinstance(found, LoraOverCallback)]
    assert over is not None
    return {
        "losses": losses,
        "logged": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "matrices": lora_matrices(trainer.model),
        "cores": cores(over),
        "rounds": [found.model_dump() for found in over.schedule.rounds],
    }


def run_twice(folder: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """What each process saw of the whole run, and of the one that goes on from its middle."""
    whole = run(folder, rows=2, **options)
    distributed.barrier()
    if distributed.get_rank() == 0:
        shutil.rmtree(folder / f"checkpoint-{STEPS}")
    distributed.barrier()
    return {"whole": whole, "resumed": run(folder, last_whole_checkpoint(folder), rows=2, **options)}


def main(folder: Path) -> None:
    found = run_twice(folder / "run")
    rank = distributed.get_rank()
    found["apart"] = run(folder / f"apart-{rank}", rows=2, dropout=0.0)
    found["static"] = run(folder / "static", rows=2, config=STATIC)
    torch.save(found, folder / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
