"""Seconds of every export beside its peer and its physical limit, and the decode latency of exported graphs.

Each measurement has a fresh process, forked from one that has everything imported, so that it counts the work after
imports. The peer of a graph's export is onnxruntime-genai's model builder alone, as its command, on the same model.

Of equal sessions, the one that a process loads first is slower by some percent, whichever graph it has; why is not
known. Each process therefore loads the graphs in another order, and every order occurs once.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from loraover.checkpoint.checkpoint import Checkpoint
from loraover.checkpoint.source import read_source
from loraover.checkpoint.tensor_file import save_tensors
from loraover.common.atomic_output import sync
from loraover.common.threads import one_thread

from benchmarks import processes
from benchmarks.intervals import median_ratio
from benchmarks.shapes import MODELS
from benchmarks.shown import table_of

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT, TOKENS, RANK, LARGE_RANK = 32, 16, 8, 16
HEAVY = ["torch", "transformers", "peft", "onnx", "onnxruntime", "onnxruntime_genai"]
HEAVY += [
    "transformers.models.llama.modeling_llama",
    "loraover_export.formats.onnx.run",
    "loraover_export.formats.vllm.run",
]
GRAPHS = ("base", "merged", "swappable")


in_child = partial(processes.in_child, preloaded=HEAVY)
"""Run a function in a new process that has everything imported."""


def make_small(folder: Path) -> None:
    """Write SmolLM2, the graph of it, a LoRA-Over checkpoint on all linear layers with a random B, and its fold."""
    from loraover import LoraOverConfig, OverParameterization, write_checkpoint
    from loraover.models.load import load_model, load_tokenizer, resolve_model
    from loraover_export import fold_checkpoint
    from loraover_export.formats.onnx.kinds.base import GraphPlan
    from loraover_export.formats.onnx.kinds.decoder import Decoder

    from support.tiny_models import with_lora

    source = resolve_model(MODEL)
    base, tokenizer = load_model(source), load_tokenizer(source)
    base.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for out in ("base", "work"):
        (folder / out).mkdir()
    Decoder().export(base, tokenizer, GraphPlan("fp32", "cpu"), folder / "work", folder / "base")
    shutil.rmtree(folder / "work")
    model: Any = with_lora(base, r=RANK, lora_alpha=2 * RANK, task_type="CAUSAL_LM")
    model.peft_config["default"].base_model_name_or_path = str(folder / "model")
    over = OverParameterization(model, LoraOverConfig(seed=0))
    model.save_pretrained(folder / "checkpoint")
    write_checkpoint(folder / "checkpoint", over, step=0)
    fold_checkpoint(folder / "checkpoint", folder / "folded")


def make_large(folder: Path) -> None:
    """Write a random adapter of 160 MiB in the shapes of Llama-3.1-8B, and the configuration of such a model."""
    from support.plain_adapter import write_adapter

    shapes, base = MODELS["Llama-3.1-8B"], folder / "large-model"
    shapes.config().save_pretrained(base)
    pairs = shapes.pairs(LARGE_RANK, torch.Generator().manual_seed(0), torch.float32)
    write_adapter(folder / "large", pairs, base_model_name_or_path=str(base), target_modules="all-linear")


def time_graph(source: Path, output: Path, options: dict[str, Any]) -> float:
    """Seconds of an ONNX export without checks."""
    from loraover_export import export_onnx

    started = time.perf_counter()
    names = ["adapter"] if options["mode"] == "swappable" else []
    export_onnx(source, output, names=names, check=False, force=True, **options)
    return time.perf_counter() - started


def time_builder(folder: Path) -> float:
    """Seconds of onnxruntime-genai's model builder, started as its command."""
    out = folder / "built"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "none", "-i", str(folder / "model")]
    command += ["-o", str(out), "-c", str(out / ".cache"), "-p", "fp32", "-e", "cpu"]
    started = time.perf_counter()
    subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, check=True)
    return time.perf_counter() - started


def time_copy(folder: Path) -> float:
    """Seconds of reading the model's weights, and of writing and syncing as many bytes."""
    started = time.perf_counter()
    shutil.copyfile(folder / "model" / "model.safetensors", folder / "copy")
    sync(folder / "copy")
    return time.perf_counter() - started


def time_vllm(source: Path, output: Path) -> float:
    """Seconds of an export for vLLM to a new folder."""
    from loraover_export import export_vllm

    shutil.rmtree(output, ignore_errors=True)
    started = time.perf_counter()
    assert export_vllm(source, output).passed
    return time.perf_counter() - started


def time_conversion(source: Path, output: Path) -> float:
    """Seconds of reading an adapter, scaling its B and converting it to bfloat16, writing and syncing it.

    A checkpoint's files are hashed, and its matrices contracted. The output is a new file.
    """
    output.unlink(missing_ok=True)
    started = time.perf_counter()
    read = read_source(source)
    converted = {}
    with one_thread(), read.open() as files:
        for key, (module, side) in read.matrices.items():
            factor = files.factor(module.site(side))
            matrix, made = factor.cores[0], factor.decomposition
            if made is not None:
                cores = [core.double() for core in factor.cores]
                matrix = made.contract(cores, factor.m, factor.n)[0]
            scaling = module.scaling if side == "B" else 1.0
            converted[key] = (matrix * scaling).bfloat16().contiguous()
    if isinstance(read, Checkpoint):
        hashlib.sha256(read.cores_path.read_bytes()).hexdigest()
    save_tensors(converted, output)
    sync(output)
    return time.perf_counter() - started


def time_decoding(folder: Path, order: Sequence[str], rounds: int) -> dict[str, float]:
    """Median seconds per token of every arm, with one session for each graph, loaded in this order.

    `weights` are the seconds of reading once the weights that a token needs, on as many threads.
    """
    import onnxruntime_genai as og

    models = {graph: og.Model(str(folder / graph)) for graph in order}
    adapters = og.Adapters(models["swappable"])
    adapters.load(str(folder / "swappable/adapter.onnx_adapter"), "adapter")
    prompt = np.random.default_rng(0).integers(3, 40_000, PROMPT)

    def decode(graph: str, *, with_adapter: bool = False) -> float:
        parameters = og.GeneratorParams(models[graph])
        parameters.set_search_options(max_length=PROMPT + TOKENS, min_length=PROMPT + TOKENS, do_sample=False)
        generator = og.Generator(models[graph], parameters)
        if with_adapter:
            generator.set_active_adapter(adapters, "adapter")
        generator.append_tokens(prompt)
        generator.generate_next_token()
        started = time.perf_counter()
        for _ in range(TOKENS - 1):
            generator.generate_next_token()
        return (time.perf_counter() - started) / (TOKENS - 1)

    weights = torch.from_numpy(np.fromfile(folder / "base/model.onnx.data", np.float32))
    embedding = 49152 * 576  # of which a token needs one row

    def read() -> float:
        started = time.perf_counter()
        weights[embedding:].sum()
        return time.perf_counter() - started

    arms: dict[str, Callable[[], float]] = {graph: partial(decode, graph) for graph in GRAPHS}
    arms |= {"swappable, adapter": partial(decode, "swappable", with_adapter=True), "weights": read}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    draw = random.Random(0)
    for turn in range(rounds + 1):
        for arm in draw.sample(list(arms), len(arms)):
            taken = arms[arm]()
            if turn:  # the first round warms up
                seconds[arm].append(taken)
    return {arm: float(np.median(taken)) for arm, taken in seconds.items()}


def in_turn(arms: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every arm in every round, in which they take turns in random order."""
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    draw = random.Random(0)
    for _ in range(rounds):
        for arm in draw.sample(list(arms), len(arms)):
            seconds[arm].append(arms[arm]())
    return seconds


def shown(numerator: Sequence[float], denominator: Sequence[float]) -> str:
    return median_ratio(numerator, denominator).shown()


def graph_table(folder: Path, rounds: int) -> Table:
    """Exports of whole graphs beside the builder, and beside copying the weights."""
    checkpoint = folder / "checkpoint"
    arms: dict[str, Callable[[], float]] = {
        "onnxruntime-genai's builder alone": lambda: time_builder(folder),
        "full graph, merged": lambda: in_child(time_graph, checkpoint, folder / "merged", {"mode": "merged"}),
        "full graph, swappable": lambda: in_child(time_graph, checkpoint, folder / "swappable", {"mode": "swappable"}),
        "copy of the weights, synced": lambda: time_copy(folder),
    }
    seconds = in_turn(arms, rounds)
    builder, _, _, copy = seconds.values()
    table = table_of(
        f"Graphs of SmolLM2-135M, 420 matrices, without checks, {rounds} rounds",
        "",
        "median",
        "to the builder [95 %]",
        "to the copy [95 %]",
    )
    for arm, taken in seconds.items():
        table.add_row(arm, f"{np.median(taken):.2f} s", shown(taken, builder), shown(taken, copy))
    return table


def adapter_table(folder: Path, rounds: int) -> Table:
    """Exports of adapters beside reading, converting and writing their bytes."""
    table = table_of(f"Adapters, {rounds} rounds", "", "export", "read, convert, write", "ratio [95 %]")
    to_vllm, added = (time_vllm, folder / "vllm"), (time_graph, folder / "added")
    options = {"mode": "swappable", "graph": folder / "swappable"}
    rows: dict[str, tuple[str, tuple[Callable[..., float], Path], tuple[Any, ...]]] = {
        "vLLM, 160 MiB in the shapes of Llama-3.1-8B": ("large", to_vllm, ()),
        "vLLM, SmolLM2, folded": ("folded", to_vllm, ()),
        "vLLM, SmolLM2, checkpoint": ("checkpoint", to_vllm, ()),
        "ONNX, SmolLM2, for an existing graph": ("folded", added, (options,)),
    }
    for name, (source, (export, output), more) in rows.items():
        arms: dict[str, Callable[[], float]] = {
            "export": partial(in_child, export, folder / source, output, *more),
            "limit": partial(in_child, time_conversion, folder / source, folder / "converted"),
        }
        taken, limits = in_turn(arms, rounds).values()
        table.add_row(name, f"{np.median(taken):.2f} s", f"{np.median(limits):.2f} s", shown(taken, limits))
    return table


def decoding_tables(folder: Path, rounds: int) -> Iterator[Table]:
    """Decode latency by graph, and by the order in which a process loaded its sessions."""
    orders = list(permutations(GRAPHS))
    runs = [in_child(time_decoding, folder, order, rounds) for order in orders]
    table = table_of(
        f"Decoding SmolLM2-135M, batch 1, {len(runs)} processes",
        "",
        "median per token",
        "ratio to base [95 %]",
        "to reading the weights [95 %]",
    )
    for arm in ("base", "merged", "swappable", "swappable, adapter"):
        taken = [run[arm] for run in runs]
        ratios = [shown(taken, [run[other] for run in runs]) for other in ("base", "weights")]
        table.add_row(arm, f"{np.median(taken) * 1000:.1f} ms", *ratios)
    yield table
    table = table_of("The same, by the order of loading", "", "ratio to the session loaded last [95 %]")
    last = [run[order[-1]] for run, order in zip(runs, orders, strict=True)]
    for place, name in enumerate(("loaded first", "loaded second")):
        table.add_row(name, shown([run[order[place]] for run, order in zip(runs, orders, strict=True)], last))
    yield table


def measure(rounds: int = 3) -> Iterable[Table]:
    """Time exports and decoding."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        in_child(make_small, folder)
        in_child(make_large, folder)
        yield graph_table(folder, rounds)
        yield adapter_table(folder, 2 * rounds)
        yield from decoding_tables(folder, rounds)
