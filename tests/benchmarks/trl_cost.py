"""CPU time of a check beside that of a step of TRL's GRPOTrainer, without the engine's time: an upper bound.

    cd tests && ../.venv/bin/python -m benchmarks.trl_cost

SmolLM2 in float32 with a LoRA learns from made-up answers, whose logprobs are right, so that there is no alarm. The
default decides how many rows a check runs.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from loraover.models.load import resolve_model
from loraover_serve import VerifyRollouts

from benchmarks.trl_rollouts import MODEL, PROMPTS
from support.online_trainers import online_trainer, planted
from support.trl_engine import Adapter, LocalEngine

STEPS, ROWS, NEW_TOKENS = 9, 32, 32


class MadeUp(LocalEngine):
    """Answers of random tokens; their logprobs are the trainer's."""

    def prepare(self) -> None:
        self.draw, self.seconds = torch.Generator().manual_seed(0), 0.0

    @torch.no_grad()
    def answer(self, prompts: Any, adapter: Adapter | None) -> list[tuple[list[int], list[float]]]:
        began, found = time.process_time(), []
        for prompt in prompts:
            ids = [*prompt, *torch.randint(100, 40_000, (NEW_TOKENS,), generator=self.draw).tolist()]
            scores = self.trained(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            answer = ids[len(prompt) :]
            found.append((answer, scores.gather(-1, torch.tensor(answer)[:, None])[:, 0].tolist()))
        self.seconds += time.process_time() - began
        return found


@click.command()
def main() -> None:
    """Print the share of a step's time that its check takes."""
    checks, whole = 0.0, 0.0

    class Timed(VerifyRollouts):
        def on_pre_optimizer_step(self, *args: Any, **options: Any) -> None:
            nonlocal checks
            began = time.process_time()
            super().on_pre_optimizer_step(*args, **options)
            checks += time.process_time() - began
            assert self.finding is not None
            assert self.finding.verdict != "differs", self.finding.reason

    source = resolve_model(MODEL).location
    with tempfile.TemporaryDirectory() as folder, planted(engine=MadeUp):
        trainer = online_trainer(
            "GRPO",
            AutoModelForCausalLM.from_pretrained(source, dtype="float32"),
            Path(folder),
            prompts=PROMPTS,
            steps=STEPS,
            learning_rate=1e-4,
            max_completion_length=NEW_TOKENS,
            per_device_train_batch_size=ROWS,
            processing_class=AutoTokenizer.from_pretrained(source),
            peft_config=LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=8, lora_alpha=16),
        )
        trainer.remove_callback(PrinterCallback)
        Timed(trainer, merged=False)
        whole -= time.process_time()
        trainer.train()
        whole += time.process_time() - trainer.vllm_generation.seconds
    print(f"checks took {checks:.1f} of {whole:.1f} s, {checks / (whole - checks):.1%} of the steps without them")


if __name__ == "__main__":
    main()
