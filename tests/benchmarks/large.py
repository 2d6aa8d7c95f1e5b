"""Convert, merge and shrink in the shapes of Llama-3.1-70B, in a process that the kernel limits to 4 GiB of memory.

The base model's files are synthetic: its embedding and head, and one shard for each of a few layers. What reads the
base model is measured on FEW and on MORE layers. The seconds of 80 layers are in proportion to those of MORE, and
their memory grows with each layer as it grows from FEW to MORE. What reads the adapter alone is measured on all 80.
"""

from __future__ import annotations

import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor

from loraover.checkpoint.files import CONFIG_FILE, TENSORS_FILE
from loraover.checkpoint.peft_adapter import KEY_PREFIX
from loraover.checkpoint.tensor_file import save_tensors
from loraover.common.provenance import host_peak_bytes

from benchmarks.exports import in_child
from benchmarks.shapes import MODELS
from benchmarks.shown import table_of

SHAPES = MODELS["Llama-3.1-70B"]
RANK, SMALLER, LOHA_RANK = 16, 8, 4
LIMIT = 2**32
"""Bytes of private memory that the kernel gives a process, imports included."""
FEW, MORE = 2, 6
"""Layers of base models that are written."""
ROWS = 1024
"""Rows of a base weight that are drawn; they are repeated, since arithmetic takes as long on them."""


class Cost(NamedTuple):
    """What one piece of work took: seconds, and the largest memory of its process in bytes, imports included."""

    seconds: float
    peak: int

    def extended(self, few: Cost) -> Cost:
        """What all layers take, by what MORE and FEW layers took."""
        each = max(0, self.peak - few.peak) / (MORE - FEW)
        return Cost(self.seconds * SHAPES.layers / MORE, round(self.peak + (SHAPES.layers - MORE) * each))


def write_base(folder: Path, layers: int) -> None:
    """Write a base model in bf16, one file for each layer and one for all else; of all layers, the configuration."""
    replace(SHAPES, layers=layers).config().save_pretrained(folder)
    if layers == SHAPES.layers:
        return
    table, norm = (SHAPES.vocabulary, SHAPES.hidden), (SHAPES.hidden,)
    files: dict[str, dict[str, tuple[int, ...]]] = {
        "ends.safetensors": {"model.embed_tokens": table, "lm_head": table, "model.norm": norm}
    }
    of_layer = {**SHAPES.linears, "input_layernorm": norm, "post_attention_layernorm": norm}
    for layer in range(layers):
        files[f"layer-{layer}.safetensors"] = {f"model.layers.{layer}.{name}": s for name, s in of_layer.items()}
    index: dict[str, str] = {}
    for number, (file, shapes) in enumerate(files.items()):
        draw = torch.Generator().manual_seed(number)
        tensors = {f"{name}.weight": _weight(shape, draw) for name, shape in shapes.items()}
        save_tensors(tensors, folder / file)
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def _weight(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    rows = torch.randn(min(ROWS, shape[0]), *shape[1:], generator=draw).mul_(0.02).bfloat16()
    return rows.repeat(-(-shape[0] // len(rows)), *([1] * (len(shape) - 1)))[: shape[0]].contiguous()


Shape = Callable[[int, int], Mapping[str, tuple[int, int]]]
"""Shapes of an adapter's tensors for a layer of m x n, by the end of their keys."""
KINDS: dict[str, tuple[dict[str, Any], Shape]] = {
    "LORA": ({"r": RANK, "lora_alpha": RANK}, lambda m, n: {"lora_A.weight": (RANK, n), "lora_B.weight": (m, RANK)}),
    "HRA": ({"r": RANK}, lambda m, n: {"hra_u": (n, RANK)}),
    "LOHA": (
        {"r": LOHA_RANK, "alpha": LOHA_RANK},
        lambda m, n: {f"hada_w{i}_{s}": (m, LOHA_RANK) if s == "a" else (LOHA_RANK, n) for i in (1, 2) for s in "ab"},
    ),
}


def write_adapter(folder: Path, kind: str, layers: int, base: Path) -> None:
    """Write a random adapter of a kind on every linear layer, in float32."""
    fields, shapes_of = KINDS[kind]
    draw = torch.Generator().manual_seed(0)
    tensors = {
        f"{KEY_PREFIX}model.layers.{layer}.{linear}.{name}": 0.02 * torch.randn(shape, generator=draw)
        for layer in range(layers)
        for linear, (m, n) in SHAPES.linears.items()
        for name, shape in shapes_of(m, n).items()
    }
    folder.mkdir()
    targets = [linear.rpartition(".")[2] for linear in SHAPES.linears]
    config = {"peft_type": kind, "task_type": "CAUSAL_LM", "target_modules": targets} | fields
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    save_tensors(tensors, folder / TENSORS_FILE)


def work(verb: str, source: Path, output: Path) -> Cost:
    """Do one piece of work within LIMIT, and delete what it wrote."""
    from loraover_export import convert_adapter, merge_adapter, shrink_adapter

    torch.set_num_threads(1)  # each thread has a layer's weight in float64
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, hard))
    verbs: dict[str, Callable[..., Any]] = {
        "convert": convert_adapter,
        "merge": merge_adapter,
        "shrink": partial(shrink_adapter, rank=SMALLER),
    }
    started = time.perf_counter()
    done = verbs[verb](source, output)
    seconds = time.perf_counter() - started
    assert done.passed
    shutil.rmtree(output)
    return Cost(seconds, host_peak_bytes())


WITH_BASE = {"convert HRA": ("convert", "HRA"), "merge a LoRA": ("merge", "LORA")}
ALONE = {"convert LoHa": ("convert", "LOHA"), f"shrink a LoRA to rank {SMALLER}": ("shrink", "LORA")}
"""Verb, and kind of the adapter."""


def measure() -> Iterator[Table]:
    """Yield the table of work in the shapes of the model."""
    table = table_of(
        f"Llama-3.1-70B in bf16, rank {RANK}, at most {LIMIT >> 30} GiB of memory, one thread",
        "",
        "measured",
        "s",
        "GiB",
        f"s, {SHAPES.layers} layers",
        f"GiB, {SHAPES.layers} layers",
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for job, (verb, kind) in WITH_BASE.items():
            few, more = (_cost(folder, verb, kind, layers) for layers in (FEW, MORE))
            extended = (f"extrapolated {cell}" for cell in _shown(more.extended(few)))
            table.add_row(job, f"{MORE} layers", *_shown(more), *extended)
        for job, (verb, kind) in ALONE.items():
            found = _shown(_cost(folder, verb, kind, SHAPES.layers))
            table.add_row(job, f"{SHAPES.layers} layers", *found, *found)
    yield table


def _shown(cost: Cost) -> tuple[str, str]:
    return f"{cost.seconds:.0f}", f"{cost.peak / 2**30:.2f}"


def _cost(folder: Path, verb: str, kind: str, layers: int) -> Cost:
    """Do one piece of work on new files, in a process of its own."""
    adapter, base = folder / f"{kind}-{layers}", folder / f"base-{layers}"
    if not base.exists():
        in_child(write_base, base, layers)
    in_child(write_adapter, adapter, kind, layers, base)
    found: Cost = in_child(work, verb, adapter, folder / "output")
    return found
