"""Conversion of every kind that `convert` takes, on one layer of 1024 x 4096, beside PEFT's `convert_to_lora`.

Both write the exact rank, or rank 64 where the exact one is larger than 1000. A conversion is timed from the adapter's
file to factors in float64 with their error; PEFT's from a loaded model to factors in float32, without an error. The
error of a conversion is that of its delta_W before a rank is cut, against the weight that PEFT merges, in float64.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.conversion import convert_to_lora
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from loraover.adapters.base_weights import open_base
from loraover.adapters.convert.kind import read_method
from loraover.adapters.convert.methods.base import Dense
from loraover.adapters.convert.run import approximate
from loraover.adapters.convert.source import open_adapter
from loraover.adapters.uniform.write_lora import Approximation
from loraover.checkpoint.base_model import resolve_base

from benchmarks.intervals import median_interval
from benchmarks.shown import table_of
from support.conversions import SOURCES, Source, make_source, our_deltas, peft_deltas

OUT, IN, RANK, CUT = 1024, 4096, 16, 64
LARGEST = 1000
"""Exact rank above which both are asked for rank CUT."""
CHOSEN: dict[str, dict[str, Any]] = {
    "lora": {},
    "pissa": {},
    "olora": {},
    "dora": {},
    "adalora": {"init_r": RANK},
    "vera": {},
    "pvera": {},
    "randlora": {},
    "unilora": {"theta_d_length": 4096},
    "vblora": {"vector_length": 64, "num_vectors": 64},
    "loha": {},
    "lokr": {"decompose_factor": 8},
    "hra": {},
    "miss": {},
    "delora": {},
    "gralora": {},
    "deft": {},
    "peanut": {},
    "osf": {"effective_rank": 1000},
    "oft": {"oft_block_size": 32, "r": 0},
    "boft": {"boft_block_size": 32},
    "road 1": {},
    "ia3": {},
    "hira": {},
    "glora": {},
    "c3a": {"block_size": 64},
    "fourierft": {"n_frequency": 4096},
    "shira": {},
    "supertuning": {},
    "trained tokens": {"token_indices": list(range(RANK))},
}
"""Fields of each adapter's configuration that differ from the tests', besides rank 16."""


def layer_source(name: str) -> Source:
    """Return one adapter of `SOURCES` on the layer."""
    source = SOURCES[name]
    options = source.options | ({"r": RANK} if source.options.get("r") else {}) | CHOSEN[name]
    is_embedding = source.kind == "TRAINABLE_TOKENS"
    return replace(source, options=options | ({} if is_embedding else {"target_modules": ["down_proj"]}))


def make_layer(folder: Path) -> Path:
    """Write a model whose down_proj is the layer; returns its folder."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=OUT, intermediate_size=IN, num_hidden_layers=1, num_attention_heads=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def seconds(work: Callable[[], object], rounds: int) -> str:
    """Return the median of the times of some runs, with its interval or range."""
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return median_interval(found).shown(3 if max(found) < 1 else 1)


def row(name: str, base: Path, folder: Path, rounds: int) -> tuple[str, ...]:
    """Measure one adapter."""
    adapter = make_source(base, folder, layer_source(name))
    ranks: dict[str, int] = {}
    ours = our_deltas(adapter, ranks)
    with quiet():
        theirs = peft_deltas(base, adapter)
    error = max(float((ours[path] - delta).norm() / delta.norm()) for path, delta in theirs.items())
    exact = max(ranks.values())
    rank = CUT if exact > LARGEST else exact
    method, layout = read_method(adapter)
    found: list[Approximation] = []
    source = resolve_base([layout], None, option="--model", say=print)
    with open_base(source) as weights, open_adapter(layout, weights) as opened:
        places = list(method.places(opened))
        full = any(isinstance(place.delta(), Dense) for place in places)

        def convert() -> None:
            found[:] = [approximate(place, layout, rank, {}) for place in places]

        our_time = seconds(convert, rounds)
    left_out = max(part.truncation_error / part.norm for part in found)
    shown = f"{exact}, full" if full else str(exact)
    return name, shown, str(rank), f"{left_out:.2f}", f"{error:.0e}", our_time, peft_time(base, adapter, rank, rounds)


def peft_time(base: Path, adapter: Path, rank: int, rounds: int) -> str:
    """Return PEFT's seconds, or that it refuses this kind."""
    with quiet():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
        try:
            return seconds(lambda: convert_to_lora(model, rank=rank), rounds)
        except (TypeError, ValueError, NotImplementedError, AttributeError) as error:
            return f"refuses ({type(error).__name__})"


def measure(rounds: int = 1) -> Iterable[Table]:
    """Yield the table of conversions."""
    title = f"One layer of {OUT} x {IN}, rank {RANK} where the kind has one, one thread"
    table = table_of(title, "adapter", "exact rank", "written", "left out", "error", "s", "PEFT, s")
    with tempfile.TemporaryDirectory() as scratch:
        base = make_layer(Path(scratch) / "base")
        for index, name in enumerate(CHOSEN):
            table.add_row(*row(name, base, Path(scratch) / str(index), rounds))
    yield table
