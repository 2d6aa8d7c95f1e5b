"""Decode latency of exported SmolLM2 graphs in onnxruntime-genai, and the seconds that each export takes.

The graphs take turns in random order within every round of one process, so that a ratio compares decoding within
seconds of one another. Exports run in a process of their own and report their seconds after imports, checks apart.
"""

from __future__ import annotations

import importlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from loraover import LoraOverConfig, OverParameterization, write_checkpoint
from loraover.models.load import load_model, load_tokenizer, resolve_model

from benchmarks.intervals import median_ratio
from support.tiny_models import with_lora

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT, TOKENS, RANK = 32, 32, 8
EXPORTS = {
    "vLLM adapter": "vllm {checkpoint} -o {out}/vllm",
    "full graph, merged": "onnx {checkpoint} -o {out}/merged --mode merged --no-check",
    "full graph, swappable": "onnx {checkpoint} -o {out}/swappable --mode swappable --name adapter --no-check",
    "swappable adapter for an existing graph": (
        "onnx {checkpoint} -o {out}/added --mode swappable --graph {out}/swappable --no-check"
    ),
}
HEAVY = ("torch", "transformers", "peft", "onnx", "onnxruntime", "loraover_export.onnx.run", "loraover_export.vllm.run")


def write_model(folder: Path) -> None:
    """A LoRA-Over checkpoint on all linear layers, its B drawn at random, and the base model's own graph."""
    from loraover_export.onnx.kinds.base import GraphPlan
    from loraover_export.onnx.kinds.decoder import Decoder

    source = resolve_model(MODEL)
    base = load_model(source)
    for out in ("base", "base/.work"):
        (folder / out).mkdir()
    Decoder().export(base, load_tokenizer(source), GraphPlan("fp32", "cpu"), folder / "base/.work", folder / "base")
    model: Any = with_lora(base, r=RANK, lora_alpha=16, task_type="CAUSAL_LM")
    model.peft_config["default"].base_model_name_or_path = source.name
    over = OverParameterization(model, LoraOverConfig(seed=0))
    model.save_pretrained(folder / "checkpoint")
    write_checkpoint(folder / "checkpoint", over, step=0)


def export_here(arguments: list[str]) -> float:
    """Seconds of one export after imports."""
    from loraover.common.command_line import quiet_libraries, run
    from loraover_export.cli import cli

    quiet_libraries()
    for module in HEAVY:
        importlib.import_module(module)
    started = time.perf_counter()
    assert run(cli, arguments) == 0
    return time.perf_counter() - started


def make_decoder(folder: Path, adapter: Path | None) -> Callable[[], float]:
    """A function that decodes from a fresh prompt and returns its seconds per token, the prompt apart."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    adapters = og.Adapters(model)
    if adapter is not None:
        adapters.load(str(adapter), "adapter")
    prompt = np.random.default_rng(0).integers(3, 40_000, PROMPT)

    def decode() -> float:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=PROMPT + TOKENS, min_length=PROMPT + TOKENS, do_sample=False)
        generator = og.Generator(model, parameters)
        if adapter is not None:
            generator.set_active_adapter(adapters, "adapter")
        generator.append_tokens(prompt)
        generator.generate_next_token()
        started = time.perf_counter()
        for _ in range(TOKENS - 1):
            generator.generate_next_token()
        return (time.perf_counter() - started) / (TOKENS - 1)

    return decode


def time_decoding(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds per token of every arm in every round."""
    arms = {
        "base": make_decoder(folder / "base", None),
        "merged": make_decoder(folder / "merged", None),
        "swappable, no adapter": make_decoder(folder / "swappable", None),
        "swappable, adapter": make_decoder(folder / "swappable", folder / "swappable/adapter.onnx_adapter"),
    }
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    order = random.Random(0)
    for turn in range(rounds + 1):
        for arm in order.sample(list(arms), len(arms)):
            taken = arms[arm]()
            if turn:  # the first round warms up
                seconds[arm].append(taken)
    return seconds


def measure(rounds: int = 15) -> Iterator[Table]:
    """Time exports and decoding."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "benchmarks.exports", "--model", scratch]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        yield export_table(Path(scratch))
        yield decoding_table(time_decoding(Path(scratch), rounds))


def export_table(folder: Path) -> Table:
    """Run every export and show its seconds."""
    table = Table(box=SIMPLE, title="Exports of SmolLM2-135M, 420 matrices, after imports and without checks")
    table.add_column("")
    table.add_column("seconds", justify="right")
    for name, line in EXPORTS.items():
        words = [word.format(checkpoint=folder / "checkpoint", out=folder) for word in line.split()]
        command = [sys.executable, "-m", "benchmarks.exports", "--export", json.dumps(words)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        table.add_row(name, f"{json.loads(done.stdout.splitlines()[-1]):.2f}")
    return table


def decoding_table(seconds: dict[str, list[float]]) -> Table:
    """Medians, and ratios to the merged and the base graph."""
    table = Table(box=SIMPLE, title=f"Decoding SmolLM2-135M, batch 1, {len(seconds['base'])} paired rounds of {TOKENS}")
    for column in ("", "median per token", "ratio to merged [95 %]", "ratio to base [95 %]"):
        table.add_column(column, justify="right" if column else "left")
    for arm, taken in seconds.items():
        ratios = [median_ratio(taken, seconds[other]).shown(3) for other in ("merged", "base")]
        table.add_row(arm, f"{np.median(taken) * 1000:.1f} ms", *ratios)
    return table


@click.command()
@click.option("--model", type=click.Path(path_type=Path))
@click.option("--export", "exported")
def main(model: Path | None, exported: str | None) -> None:
    """Write the model, or run one export, in this process."""
    if model is not None:
        write_model(model)
    if exported is not None:
        print(export_here(json.loads(exported)))


if __name__ == "__main__":
    main()
