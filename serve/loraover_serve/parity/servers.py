"""Measurements of servers beside times: peak memory with one arm alone, and `vllm bench serve` on the same server."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from pydantic import Field
from scipy import stats

from loraover.common.errors import EngineError
from loraover.common.strict_json import StrictModel
from loraover_serve.engines.base import BatchingEngine, Sample, Setting, TokenRequest
from loraover_serve.parity.samples import Measurement
from loraover_serve.vllm.request import KEY_VARIABLE

if TYPE_CHECKING:
    from loraover_serve.engines.base import Setting
    from loraover_serve.engines.vllm import VllmEngine

POLL_S = 0.2
MIN_SERVERS = 3


class PeakMemory(StrictModel):
    """Peak memory of servers with one arm alone; the verdict does not depend on it."""

    concurrency: int
    arm: str
    bytes: list[int] = Field(description="Peak memory of each server that was started, in bytes")
    interval: tuple[float, float] | None = Field(
        description="95 % t interval of the mean, in bytes; None for fewer than 3 servers"
    )


@dataclass
class Peak:
    """Largest memory so far, in bytes."""

    bytes: int = 0


@contextmanager
def peak_of(session: int) -> Iterator[Peak]:
    """Measure the peak memory of a process and its descendants during a block.

    Memory that processes share is divided among them (proportional set size) if the system reports that.

    Args:
        session: Id of the process.
    """
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        ended = False
        while not ended:
            ended = done.wait(POLL_S)  # measure once more at the end
            peak.bytes = max(peak.bytes, _memory(session))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()


def _memory(session: int) -> int:
    total = 0
    with suppress(psutil.NoSuchProcess):
        leader = psutil.Process(session)
        for process in (leader, *leader.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                found = process.memory_full_info()
                total += getattr(found, "pss", found.rss)
    return total


def measure_memory(
    kind: type[BatchingEngine],
    setting: Setting,
    arm: str,
    requests: Sequence[TokenRequest],
    *,
    concurrency: int,
    servers: int,
) -> PeakMemory:
    """Start servers with one arm alone, one after another, and send the requests to each."""
    peaks: list[Peak] = []

    @contextmanager
    def watch(pid: int) -> Iterator[None]:
        with peak_of(pid) as peak:
            peaks.append(peak)
            yield

    for _ in range(servers):
        with kind.start_arms(replace(setting, watch=watch)) as (engine,):
            for first in range(0, len(requests), concurrency):
                engine.run(arm, 0, first, requests[first : first + concurrency])
    found = [peak.bytes for peak in peaks]
    return PeakMemory(concurrency=concurrency, arm=arm, bytes=found, interval=mean_interval(found))


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % t interval of the mean of a few values; None for fewer than 3, whose spread is too uncertain."""
    if len(values) < MIN_SERVERS:
        return None
    mean, half = fmean(values), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean - half, mean + half


TIMEOUT_S = 3600
FIGURES: dict[str, tuple[str, Callable[[Sample], float]]] = {
    "time to first token": ("median_ttft_ms", lambda sample: sample.first_token_s),
    "time per output token": ("median_tpot_ms", lambda sample: sample.per_token_s),
    "end-to-end latency": ("median_e2el_ms", lambda sample: sample.end_to_end_s),
}


class CrossCheck(StrictModel):
    """Medians of one arm by both benchmarks, in seconds; the verdict does not depend on them."""

    concurrency: int
    arm: str
    measure: str
    ours: float = Field(description="Median of our measurement, in seconds")
    bench_serve: float = Field(description="Median of `vllm bench serve` on the same prompts, in seconds")


def cross_check(
    run: Measurement,
    arm: str,
    engine: VllmEngine,
    requests: Sequence[TokenRequest],
    tokenizer: Any,
    setting: Setting,
) -> list[CrossCheck]:
    """Run vLLM's benchmark on the prompts of a run, with the most frequent length of an answer.

    Args:
        run: Our measurement.
        engine: The server.
        requests: Requests of the run; their prompts are sent as text.
        tokenizer: Tokenizer of the base model.
        setting: Settings of the server, whose folder gets the benchmark's files.

    Raises:
        EngineError: A benchmark that cannot be started, fails, or loses requests.
    """
    folder, model, url, vllm = setting.scratch, engine.names[arm], engine.server.url, setting.request.vllm
    prompts = folder / "prompts.jsonl"
    texts = [tokenizer.decode(request.prompt) for request in requests]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    result = folder / f"bench-{arm}-{run.concurrency}.json"
    lengths = [request.new_tokens for request in requests]
    command = [
        *(vllm, "bench", "serve", "--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions"),
        *("--model", model, "--tokenizer", tokenizer.name_or_path, "--served-model-name", model),
        *("--dataset-name", "custom", "--dataset-path", str(prompts), "--skip-chat-template", "--disable-shuffle"),
        *("--custom-output-len", str(max(set(lengths), key=lengths.count)), "--ignore-eos", "--temperature", "0"),
        *("--num-prompts", str(len(requests)), "--max-concurrency", str(run.concurrency)),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--disable-tqdm"),
        *("--save-result", "--result-dir", str(folder), "--result-filename", result.name),
    ]
    found = _run(command, result)
    if found.get("completed") != len(requests):
        raise EngineError(f"vllm bench serve: {found.get('completed')} of {len(requests)} requests were answered.")
    lacking = [key for key, _ in FIGURES.values() if key not in found]
    if lacking:
        raise EngineError(f"vllm bench serve: its result lacks {', '.join(lacking)}.")
    samples = [sample for sample in run.samples if sample.arm == arm]
    return [
        CrossCheck(
            concurrency=run.concurrency,
            arm=arm,
            measure=name,
            ours=float(np.median([measure(sample) for sample in samples])),
            bench_serve=found[key] / 1000,
        )
        for name, (key, measure) in FIGURES.items()
    ]


def _run(command: Sequence[str], result: Path) -> dict[str, Any]:
    key = os.environ.get(KEY_VARIABLE)
    environment = os.environ | ({"OPENAI_API_KEY": key} if key else {})  # the variable that `vllm bench serve` reads
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, env=environment, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"vllm bench serve: {error}") from error
    if done.returncode != 0 or not result.is_file():
        last = (done.stderr.strip() or "no message").splitlines()[-1]  # the last line of a traceback is the cause
        raise EngineError(f"vllm bench serve ended with code {done.returncode}: {last}")
    content: dict[str, Any] = json.loads(result.read_text())
    return content
