"""Processor time of `loraover record`, beside that of the base model's forward passes over the same questions.

SmolLM2-135M has a random adapter of rank 8 on all its linear layers. The plain passes run the recorded questions with
their answers, each token once, as transformers does. Times are processor time of one thread.
"""

from __future__ import annotations

import gzip
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table

from loraover.common.threads import one_thread
from loraover.models.load import load_model, resolve_model
from loraover_serve import record_adapter
from loraover_serve.engines.torch import model_logits

from benchmarks.shown import table_of

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTIONS = Path(__file__).parents[2] / "docs" / "examples" / "questions.txt"
ROUNDS = 5  # of plain passes, of which the median counts


def save_adapter(folder: Path) -> None:
    """Save an adapter that changes answers."""
    torch.manual_seed(0)
    model = get_peft_model(load_model(resolve_model(MODEL)), LoraConfig(r=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model.save_pretrained(str(folder))


def plain_seconds(reference: dict[str, Any]) -> float:
    """Processor time of a pass of the base model over all recorded questions, in s."""
    model = load_model(resolve_model(MODEL))
    sequences = [[*each["prompt"], *each["answer"][:-1]] for each in reference["questions"]]
    seconds = []
    for _ in range(ROUNDS):
        start = time.process_time()
        with torch.inference_mode():
            list(model_logits(model, sequences, last=len(reference["questions"][0]["answer"])))
        seconds.append(time.process_time() - start)
    return median(seconds)


def row(folder: Path, words: str, prompts: Path | None, *, long: bool) -> tuple[str, ...]:
    """Record, and compare the time with that of plain passes over the questions."""
    file, start = folder / f"{words}.json.gz", time.process_time()
    report = record_adapter(folder / "adapter", model=MODEL, prompts=prompts, long=long, device="cpu", output=file)
    took_s = time.process_time() - start
    plain_s = plain_seconds(json.loads(gzip.decompress(file.read_bytes())))
    return words, str(report.questions), str(report.variants), f"{took_s:.1f} s", f"{took_s / plain_s:.0f}"


def measure() -> list[Table]:
    """Record an adapter with few questions, with long ones too, and with the built-in ones."""
    with one_thread(), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_adapter(folder / "adapter")
        rows = [
            row(folder, "short questions alone", QUESTIONS, long=False),
            row(folder, "with long questions", QUESTIONS, long=True),
            row(folder, "built-in questions", None, long=False),
        ]
    title = "Recording, in passes of the base model over the recorded questions"
    table = table_of(title, "recorded", "questions", "models with a fault", "processor time", "passes")
    for each in rows:
        table.add_row(*each)
    return [table]
