"""Adapters that change while clients ask for them, on the real vLLM: whose answer each one was.

    cd tests && ../.venv/bin/python -m benchmarks.churn SECONDS [--only KIND] [--into FILE]

A tiny Llama in float32 has 12 adapters, of which two fit into a batch. Each second one of them gets new weights,
which were never seen before, while 8 clients ask for adapters and for the base model, greedily and with vLLM's prefix
cache on. PyTorch answers every prompt with each version before it is written. An answer belongs to the nearest of all
models that were known then, by its tokens' logprobs, if it is within `SAME` of that model's: else it belongs to none,
such as one that the new weights computed on cached keys and values of the old ones.

With our plug-in, the adapters' folders are overwritten in place, and nothing else is done. The stock server gets each
version by the documented way, an unload and a load: from the same folder, or from a new one. A stock server ends when a
name is loaded again beside a request that runs. What was found is written every few seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from rich.table import Table

from loraover.common.atomic_output import publish_text
from loraover.common.errors import EngineError
from loraover_serve.vllm.client import Completion, VllmServer
from loraover_serve.vllm.server import VllmServerConfig

from benchmarks.shown import console, table_of
from support.engine_forms import TINY
from support.plain_adapter import tiny_decoder, write_adapter
from support.plugin import MAX_RANK, plugged
from support.tiny_hub import tiny_tokenizer
from support.vllm_loading import load_adapter, serving_loader, unload_adapter

ADAPTERS, CLIENTS, BATCH = 12, 8, 2
RELOAD_S, WRITE_S = 1.0, 10.0
PROMPTS, PROMPT_TOKENS, TOKENS = 4, 104, 8
VOCABULARY, RANK, SCALING = 72, 4, 2.0
BLOCK = 32
"""Tokens of a block of the prefix cache, of which a prompt fills three."""
SAME = 1e-4
"""Largest difference of a logprob, in nats, between an engine's answer and PyTorch's with the same weights."""
BASE = ""
"""Name of the base model here."""
KINDS = ("plug-in", "stock, same folder", "stock, new folders")
WORKER = "VLLM::Worker"
"""How the process that holds the model calls itself."""
OPTIONS = ("--enable-prefix-caching", "--block-size", str(BLOCK))

Floats = NDArray[np.float32]


class Models:
    """The base model, each version of each adapter, and what PyTorch answers with them.

    Args:
        base: Folder of the base model.
    """

    def __init__(self, base: Path) -> None:
        self._model = tiny_decoder("Llama", vocab_size=VOCABULARY)
        self._model.save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
        self._weights = {
            name.removesuffix(".weight"): weight.detach().clone()
            for name, weight in self._model.named_parameters()
            if "_proj" in name
        }
        draws = torch.Generator().manual_seed(0)
        self.prompts = torch.randint(3, VOCABULARY, (PROMPTS, PROMPT_TOKENS), generator=draws)
        self.names: list[str] = []
        self._tokens: list[NDArray[np.int64]] = []
        self._logprobs = np.empty((64, PROMPTS, TOKENS, VOCABULARY), np.float32)
        self._lock = threading.Lock()
        self.replaced: dict[int, float] = {}
        self._add(BASE, {})

    def make(self, name: str, folder: Path) -> None:
        """Draw the next version of an adapter, let PyTorch answer with it, and write it over the folder's files."""
        draws, pairs = torch.Generator().manual_seed(len(self.names)), {}
        for module, weight in self._weights.items():
            rows, columns = weight.shape
            a = torch.randn(RANK, columns, generator=draws) / columns**0.5
            pairs[module] = (a, 0.5 * torch.randn(rows, RANK, generator=draws))
        self._add(name, pairs)
        with tempfile.TemporaryDirectory() as scratch:
            targets = sorted({module.rpartition(".")[2] for module in pairs})
            made = write_adapter(Path(scratch) / "adapter", pairs, lora_alpha=SCALING * RANK, target_modules=targets)
            shutil.copytree(made, folder, dirs_exist_ok=True)

    @torch.no_grad()
    def _add(self, name: str, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        for module, weight in self._weights.items():
            a, b = pairs.get(module, (torch.zeros(1, weight.shape[1]), torch.zeros(weight.shape[0], 1)))
            self._model.get_submodule(module).weight.copy_(weight + SCALING * b @ a)
        ids, found = self.prompts, []
        for _ in range(TOKENS):
            found.append(self._model(ids).logits[:, -1].log_softmax(-1))
            ids = torch.cat([ids, found[-1].argmax(-1, keepdim=True)], dim=1)
        with self._lock:
            number, now = len(self.names), time.monotonic()
            if number == len(self._logprobs):
                self._logprobs = np.concatenate([self._logprobs, np.empty_like(self._logprobs)])
            self._logprobs[number] = torch.stack(found, dim=1).numpy()
            self._tokens.append(ids[:, -TOKENS:].numpy())
            if name in self.names:
                self.replaced[len(self.names) - 1 - self.names[::-1].index(name)] = now
            self.names.append(name)

    def distances(self, prompt: int, answer: Completion) -> Floats:
        """Largest difference of a logprob, in nats, from each model, up to the first token that it would not give.

        There, the model's own token counts, too: it is as far as it is likelier than the answer's.
        """
        with self._lock:
            number = len(self.names)
            logprobs, tokens = self._logprobs[:number, prompt], np.stack([each[prompt] for each in self._tokens])
        given = np.array(answer.token_ids)
        own = logprobs[:, np.arange(TOKENS), given]
        differs = given != tokens
        counts = np.cumsum(differs, axis=1) - differs == 0  # up to the first one that differs, and that one
        lead = np.where(differs, logprobs.max(axis=2) - own, 0)
        found: Floats = (np.maximum(np.abs(own - np.array(answer.logprobs)), lead) * counts).max(axis=1)
        return found


@dataclass
class Found:
    """What was found with one server, so far.

    Args:
        kind: One of `KINDS`.
        seconds: Seconds for which clients have asked.
        reloads: Number of versions that were written.
        served: Number of versions that the plug-in served anew; None without it.
        answers: Number of answers by whose they were: "its name", "another adapter", "base" or "none".
        base: The same, of the answers for the base model.
        refused: Number of requests without an answer, by the error's beginning.
        farthest: Largest distance of an answer from the model that it belongs to, in nats.
        nearest_other: Smallest distance of such an answer from any other model, in nats.
        ratio: Largest distance of such an answer from its model over that from the nearest other; None if not kept.
        load: Largest load of the machine, averaged over a minute; None if not kept.
        late_s: Longest time for which an earlier version was asked for and answered, in seconds.
        ended_s: Seconds after which the server ended; None if it did not.
        memory: Seconds, and the resident memory of the server's processes in MiB, by their names.
    """

    kind: str
    seconds: float = 0.0
    reloads: int = 0
    served: int | None = None
    answers: Counter[str] = field(default_factory=Counter)
    base: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    farthest: float = 0.0
    nearest_other: float = float("inf")
    ratio: float | None = None
    load: float | None = None
    late_s: float = 0.0
    ended_s: float | None = None
    memory: list[tuple[float, dict[str, float]]] = field(default_factory=list)

    @classmethod
    def read(cls, written: Mapping[str, Any]) -> Found:
        """Return what was written of an earlier run."""
        counters = {name: Counter(written[name]) for name in ("answers", "base", "refused")}
        return cls(**{**written, **counters})

    def marks(self, name: str = "") -> list[float]:
        """Memory in MiB after the first minute, in the middle and at the end, of processes whose name begins so."""
        kept = [memory for at_s, memory in self.memory if at_s > min(60.0, self.seconds / 4)]
        sums = [sum(mib for process, mib in memory.items() if process.startswith(name)) for memory in kept]
        return [sums[0], sums[len(sums) // 2], sums[-1]] if sums else []

    def words(self) -> str:
        """How sure the owners of answers are, how late versions were, and what the worker's memory did."""
        said = (
            f"{self.kind}: an answer is at most {self.farthest:.1e} nats from its model, and every other model is at "
            f"least {self.nearest_other:.1e} nats from such an answer"
        )
        if self.ratio is not None:
            said += f"; its model's distance is at most {self.ratio:.2g} of the nearest other's"
        said += f". A version still answered up to {self.late_s:.1f} s after it was replaced"
        said += "" if self.load is None else f", on a machine with a load of up to {self.load:.0f}"
        _, middle, end = self.marks(WORKER) or (0.0, 0.0, 0.0)
        return said + (
            f". vLLM's own worker went from {middle:.0f} to {end:.0f} MiB in the second half." if end else "."
        )

    def count(self, models: Models, name: str, prompt: int, asked: float, answer: Completion) -> None:
        """Count one answer: whose it was."""
        distances = models.distances(prompt, answer)
        nearest = int(distances.argmin())
        owner = models.names[nearest] if distances[nearest] < SAME else None
        counted = self.base if name == BASE else self.answers
        if owner != name:
            counted["none" if owner is None else "base" if owner == BASE else "another adapter"] += 1
            return
        counted["its name"] += 1
        self.farthest = max(self.farthest, float(distances[nearest]))
        other = float(np.partition(distances, 1)[1])
        self.nearest_other = min(self.nearest_other, other)
        self.ratio = max(self.ratio or 0.0, float(distances[nearest]) / other) if other else 1.0
        self.late_s = max(self.late_s, asked - models.replaced.get(nearest, asked))

    def keep(self, running: Churned, seconds: float, file: Path | None) -> None:
        """Look at the server after some seconds, and write what was found until then."""
        self.seconds = seconds
        self.load = max(self.load or 0.0, os.getloadavg()[0])
        if self.ended_s is None:
            self.memory.append((seconds, running.memory()))
        if self.kind == "plug-in":
            self.served = running.log.read_text(errors="replace").count("has changed, and is served from")
        if file is not None:
            publish_text(file, json.dumps(vars(self), indent=1) + "\n")


@dataclass(frozen=True)
class Churned:
    """A server whose adapters change.

    Args:
        server: Its client.
        base: Folder of the base model.
        adapters: Folder of the adapters.
        log: File of its output.
    """

    server: VllmServer
    base: Path
    adapters: Path
    log: Path

    def change(self, kind: str, models: Models, name: str, number: int) -> None:
        """Write a new version of an adapter; the stock server is told, too."""
        folder = self.adapters / (f"{name}-{number}" if kind == "stock, new folders" else name)
        models.make(name, folder)
        if kind != "plug-in":
            with suppress(EngineError):  # it is not loaded yet
                unload_adapter(self.server, name)
            load_adapter(self.server, name, folder)

    def memory(self) -> dict[str, float]:
        """Resident memory of the server's processes, in MiB, by their names and numbers."""
        found = {}
        for process in [psutil.Process(self.server.pid), *psutil.Process(self.server.pid).children(recursive=True)]:
            with suppress(psutil.Error):
                words = process.cmdline()
                worker = "preparing" if "loraover_serve.plugin.worker" in words else " ".join(words)[:20]
                name = "API server" if process.pid == self.server.pid else worker
                found[f"{name} ({process.pid})"] = process.memory_info().rss / 2**20
        return found


@contextmanager
def served(kind: str, folder: Path) -> Iterator[tuple[Churned, Models]]:
    """Serve the base model with a first version of each adapter, which is loaded."""
    base, adapters = folder / "base", folder / "adapters"
    adapters.mkdir(parents=True)
    models = Models(base)
    if kind == "plug-in":
        for number in range(ADAPTERS):
            models.make(f"a{number}", adapters / f"a{number}")
        with plugged(folder / "server", (base, adapters), folder / "cache", *OPTIONS) as started:
            yield Churned(started.server, base, adapters, started.log), models
        return
    options = ("--enable-lora", "--max-loras", str(BATCH), "--max-lora-rank", str(MAX_RANK), *TINY, *OPTIONS)
    log = folder / "vllm.log"
    with serving_loader(VllmServerConfig(str(base), options=options), log) as server:
        running = Churned(server, base, adapters, log)
        for number in range(ADAPTERS):
            running.change(kind, models, f"a{number}", number)
        yield running, models


def churn(kind: str, seconds: float, folder: Path, file: Path | None = None) -> Found:
    """Change adapters once a second beside clients, until the time is over or the server has ended.

    Args:
        kind: One of `KINDS`.
        seconds: Seconds for which clients ask.
        folder: Folder for everything that is made, which is new.
        file: File for what is found, written every `WRITE_S` seconds; None: none.
    """
    found = Found(kind)
    with served(kind, folder) as (running, models):
        over, lock, begun = threading.Event(), threading.Lock(), time.monotonic()

        def ask(client: int) -> None:
            draws = np.random.default_rng(client)
            while not over.is_set():
                number, prompt = int(draws.integers(ADAPTERS + 1)), int(draws.integers(PROMPTS))
                name = BASE if number == ADAPTERS else f"a{number}"
                asked = time.monotonic()
                try:
                    answer = running.server.complete(
                        name or str(running.base), models.prompts[prompt].tolist(), max_tokens=TOKENS, timeout_s=60
                    )
                except EngineError as error:
                    if over.wait(0.1) or not running.server.is_alive():
                        return
                    with lock:
                        found.refused[f"{error}".replace(running.server.url, "")[:80]] += 1
                    continue
                with lock:
                    found.count(models, name, prompt, asked, answer)

        with ThreadPoolExecutor(CLIENTS) as pool:
            asking = [pool.submit(ask, client) for client in range(CLIENTS)]
            written = begun
            try:
                while time.monotonic() - begun < seconds and found.ended_s is None:
                    time.sleep(max(0.0, begun + (found.reloads + 1) * RELOAD_S - time.monotonic()))
                    number = found.reloads % ADAPTERS
                    with suppress(EngineError):
                        running.change(kind, models, f"a{number}", found.reloads + ADAPTERS)
                    found.reloads += 1
                    if not running.server.is_alive():
                        found.ended_s = round(time.monotonic() - begun, 1)
                    if time.monotonic() - written > WRITE_S:
                        written = time.monotonic()
                        with lock:
                            found.keep(running, round(written - begun, 1), file)
            finally:
                over.set()
        for each in asking:
            each.result()
        found.keep(running, round(time.monotonic() - begun, 1), file)
    return found


def to_table(found: Sequence[Found]) -> Table:
    """Return the table of what was found with each server."""
    table = table_of(
        f"{ADAPTERS} adapters, {CLIENTS} clients, a new version every {RELOAD_S:g} s, --max-loras {BATCH}",
        *(
            "server",
            "time",
            "versions",
            "served",
            "answers",
            "of its name",
            "another's",
            "of no version",
            "base, right",
        ),
        *("ended", "memory at start, middle, end"),
        caption="Memory is that of all the server's processes after the first minute, in the middle and at the end.",
    )
    for each in found:
        shown = each.marks()
        base = f"{each.base['its name']} of {each.base.total()}"
        ended = "no" if each.ended_s is None else f"after {each.ended_s:.0f} s"
        counts = (each.answers[whose] for whose in ("its name", "another adapter", "none"))
        table.add_row(
            *(
                each.kind,
                f"{each.seconds:.0f} s",
                str(each.reloads),
                *map(str, ("-" if each.served is None else each.served, each.answers.total())),
                *map(str, counts),
            ),
            *(base, ended, ", ".join(f"{mib:.0f}" for mib in shown) + (" MiB" if shown else "-")),
        )
    return table


def is_right(found: Found) -> bool:
    """Whether the server runs still, and every answer belongs to its name."""
    return found.ended_s is None and all(each["its name"] == each.total() for each in (found.answers, found.base))


@click.command()
@click.argument("seconds", type=float)
@click.option("--only", "kinds", multiple=True, type=click.Choice(KINDS), help="Server to try; repeatable.")
@click.option("--into", type=click.Path(path_type=Path), help="Folder for what is found.", default="churn")
def main(seconds: float, kinds: Sequence[str], into: Path) -> None:
    """Change adapters beside clients for SECONDS on each server, and show whose answers came."""
    torch.set_num_threads(1)
    into.mkdir(parents=True, exist_ok=True)
    found = []
    for kind in kinds or KINDS:
        with tempfile.TemporaryDirectory() as scratch:
            file = into / f"{kind.replace(', ', '-').replace(' ', '-')}.json"
            found.append(churn(kind, seconds, Path(scratch) / "churn", file))
        console().print(to_table(found))


if __name__ == "__main__":
    main()
