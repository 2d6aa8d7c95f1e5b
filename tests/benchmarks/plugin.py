"""Longest gap between the tokens of a running stream while vLLM's plug-in prepares and loads an adapter beside it.

The server is the real vLLM for CPUs with the plug-in and SmolLM2; the adapter is a LoRA of rank 256 on all linear
layers in bfloat16. Each round streams the base model four times, in alternating order: alone; beside a request for an
adapter that was never prepared; beside the preparation of another one; and beside the first request for that one,
which is then prepared and not loaded. Each round has new adapters. The process that prepares adapters has prepared one
before, so that its imports are not measured.

vLLM loads between two steps of its engine: in 0.32, `add_lora` of vllm/v1/engine/core.py, which `resolve_lora` of
vllm/entrypoints/openai/models/serving.py calls.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import httpx2
from rich.table import Table

from loraover.models.load import resolve_model

from benchmarks.fleet import make_plain
from benchmarks.intervals import median_ratio
from benchmarks.shapes import MODELS
from benchmarks.shown import table_of
from support.plugin import Plugged, plugged

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHAPES = MODELS["SmolLM2-135M"]
RANK, ROUNDS = 256, 6
STREAM_S = 15.0
"""Seconds that a stream is to last, longer than the request beside it; its tokens are as many as fit before."""
WARM_TOKENS = 32
DELAY_S = 1.0
"""Seconds of the stream before the request beside it."""
SILENCE_S = 300.0
PROMPT = tuple(range(100, 116))
OPTIONS = ("--dtype", "bfloat16", "--max-model-len", "8192", "--max-loras", "1")

ALONE, COLD, PREPARING, LOADING = (
    "nothing",
    "first request, never prepared",
    "preparation, without a load",
    "first request, prepared before",
)
ORDERS = ((ALONE, COLD, PREPARING, LOADING), (PREPARING, LOADING, COLD, ALONE))
"""Orders of the streams in even and in odd rounds; what is loaded was prepared before."""


class Sample(NamedTuple):
    """What one stream met.

    Args:
        gap_s: Longest time between two of its tokens, in seconds.
        stream_s: Time from its first to its last token, in seconds.
        answer_s: Time until the request beside it was answered, in seconds; 0 without one.
        prepare_s: Time of that in which the adapter was prepared, in seconds.
    """

    gap_s: float
    stream_s: float
    answer_s: float = 0.0
    prepare_s: float = 0.0


def stream_beside(running: Plugged, tokens: int, ask: Callable[[], httpx2.Response] | None) -> Sample:
    """Stream the base model, and send a request beside it."""
    asked = answered = 0.0
    with ThreadPoolExecutor(1) as pool:
        begun = pool.submit(running.server.stream, str(running.base), PROMPT, max_tokens=tokens, timeout_s=SILENCE_S)
        if ask is not None:
            time.sleep(DELAY_S)
            asked, answer, answered = time.perf_counter(), ask(), time.perf_counter()
            if not answer.is_success:
                raise RuntimeError(f"the request beside the stream was answered {answer.status_code}: {answer.text}")
        times = begun.result().piece_s
    if ask is not None and not times[0] < asked < answered < times[-1]:
        raise RuntimeError(
            f"the request ran from {asked - times[0]:.1f} to {answered - times[0]:.1f} s of a stream of "
            f"{times[-1] - times[0]:.1f} s, expected within it; change STREAM_S or DELAY_S."
        )
    return Sample(max(after - before for before, after in pairwise(times)), times[-1] - times[0], answered - asked)


def prepare_s(running: Plugged, name: str) -> float:
    """Return the seconds that preparing an adapter took, as its record says."""
    record: dict[str, Any] = running.get(f"/v1/adapters/{name}/certificate").json()["prepared"]
    return float(record["seconds"])


def measure_round(running: Plugged, number: int, tokens: int) -> dict[str, Sample]:
    """Measure all streams of one round, with two new adapters, which are removed afterwards."""
    cold, other = (f"{kind}-{number}" for kind in ("cold", "other"))
    for name, seed in ((cold, 2 * number), (other, 2 * number + 1)):
        make_plain(running.adapters / name, running.base, seed, RANK, SHAPES)
    beside: Mapping[str, Callable[[], httpx2.Response] | None] = {
        ALONE: None,
        COLD: lambda: running.complete(cold),
        PREPARING: lambda: running.post(f"/v1/adapters/{other}/prefetch"),
        LOADING: lambda: running.complete(other),
    }
    found = {name: stream_beside(running, tokens, beside[name]) for name in ORDERS[number % len(ORDERS)]}
    for name, adapter in ((COLD, cold), (PREPARING, other)):
        found[name] = found[name]._replace(prepare_s=prepare_s(running, adapter))
    for name in (cold, other):
        shutil.rmtree(running.adapters / name)
    return found


def measure() -> list[Table]:
    """Measure all rounds on one server, after an adapter and two streams that warm it up."""
    found: dict[str, list[Sample]] = defaultdict(list)
    base = Path(resolve_model(MODEL).location)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        adapters = folder / "adapters"
        warm = make_plain(adapters / "warm", base, 2 * ROUNDS, RANK, SHAPES)
        mib = (warm / "adapter_model.safetensors").stat().st_size / 2**20
        place, cache = folder / "server", folder / "cache"
        with plugged(place, (base, adapters), cache, *OPTIONS, max_rank=RANK, settle_s=0) as running:
            running.complete("warm").raise_for_status()
            stream_beside(running, WARM_TOKENS, None)
            tokens = int(STREAM_S / stream_beside(running, WARM_TOKENS, None).stream_s * (WARM_TOKENS - 1))
            version = running.server.version()
            for number in range(ROUNDS):
                for name, sample in measure_round(running, number, tokens).items():
                    found[name].append(sample)
    return [to_table(found, f"vLLM {version}, SmolLM2-135M, streams of {tokens} tokens, adapter of {mib:.0f} MiB")]


def to_table(found: Mapping[str, Sequence[Sample]], setting: str) -> Table:
    """Return the table of medians."""
    table = table_of(
        f"{setting}, {ROUNDS} rounds, medians",
        *("beside the stream", "longest gap", "to alone [95 %]", "stream", "answered after"),
        *("of it preparing", "load and rest"),
        caption="vLLM loads an adapter between two steps of its engine, which computes no token of any stream "
        "meanwhile, with the plug-in or without. The last row has this load, a look-up in the cache and the step of "
        "the request's prompt, and no preparing.",
    )
    alone = found[ALONE]
    for name in ORDERS[0]:
        samples = found[name]
        ratio = median_ratio([sample.gap_s for sample in samples], [sample.gap_s for sample in alone])
        spent = (
            median(sample.answer_s for sample in samples),
            median(sample.prepare_s for sample in samples),
            median(sample.answer_s - sample.prepare_s for sample in samples),
        )
        table.add_row(
            name,
            f"{median(sample.gap_s for sample in samples) * 1e3:.0f} ms",
            ratio.shown(),
            f"{median(sample.stream_s for sample in samples):.1f} s",
            *(f"{seconds:.1f} s" if seconds else "" for seconds in spent),
        )
    return table
