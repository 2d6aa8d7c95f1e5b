"""Checks of SmolLM2 with its weights in memory, and read from their files within a limit on the process's memory.

The model is stored in bf16, in files of at most 100 MB, and computed in float32, where its weights take 538 MB. Each
process first does the same work on a tiny model, so that what it imports does not count. Then its control group
(version 1, which takes root on Linux) is limited to what the process has, and LIMIT_MIB more: the kernel drops pages of
files to keep the group within its limit, and kills a process that needs more. Elsewhere the limit is not set, and the
memory is measured all the same: it is what the process has for itself, read from /proc every few milliseconds.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

from rich.table import Table

from benchmarks.exports import MODEL, in_child
from benchmarks.shown import table_of

RANK = 2
MAX_MEMORY_GIB = 0.1
GROUPS = Path("/sys/fs/cgroup/memory")
EVERY_S = 0.003
QUESTIONS = "The train leaves at nine\nA farmer has 17 sheep\ndef is_even(number):\nWater boils at a lower\n"
VERBS = ("fold --check-error", "verify", "record")
LIMIT_MIB = 200


def make(folder: Path) -> None:
    """Write SmolLM2 and a tiny model, and for each a checkpoint with random cores and its fold."""
    from loraover import LoraOverConfig, OverParameterization, write_checkpoint
    from loraover.models.load import load_model, load_tokenizer, resolve_model
    from loraover_export import fold_checkpoint

    from support.tiny_hub import save_llama
    from support.tiny_models import with_lora

    smollm2 = resolve_model(MODEL)
    load_model(smollm2, dtype="bf16").save_pretrained(folder / "large", max_shard_size="100MB")
    load_tokenizer(smollm2).save_pretrained(folder / "large")
    save_llama(folder / "small")
    for name in ("large", "small"):
        source = resolve_model(str(folder / name))
        model: Any = with_lora(load_model(source), r=RANK, lora_alpha=2 * RANK, task_type="CAUSAL_LM")
        over = OverParameterization(model, LoraOverConfig(seed=0))
        model.save_pretrained(folder / f"{name}-checkpoint")
        write_checkpoint(folder / f"{name}-checkpoint", over, step=0)
        fold_checkpoint(folder / f"{name}-checkpoint", folder / f"{name}-folded")
    (folder / "questions.txt").write_text(QUESTIONS)


def check(verb: str, folder: Path, name: str, limit: float | None) -> None:
    """Do one piece of work on a model."""
    from loraover_export import fold_checkpoint
    from loraover_serve import record_adapter, verify_adapter

    options: dict[str, Any] = {"device": "cpu", "max_memory_gib": limit}
    questions: dict[str, Any] = {"prompts": folder / "questions.txt", "new_tokens": 2}
    folded = folder / f"{name}-folded"
    if verb == "verify":
        assert verify_adapter(folded, engines=["torch"], **questions, **options).verdict == "as trained"
    elif verb == "record":
        record_adapter(folded, output=folder / "reference.json.gz", force=True, **questions, **options)
    else:
        output = folder / "output"
        assert fold_checkpoint(folder / f"{name}-checkpoint", output, check_error=True, force=True, **options).passed


@dataclass
class Memory:
    """Private memory of this process during a block, in bytes."""

    before: int = 0
    most: int = 0
    _ending: Event = field(default_factory=Event)

    def sample(self) -> None:
        while not self._ending.wait(EVERY_S):
            self.most = max(self.most, _private())

    @contextmanager
    def measured(self) -> Iterator[None]:
        self.before = self.most = _private()
        thread = Thread(target=self.sample)
        thread.start()
        try:
            yield
        finally:
            self._ending.set()
            thread.join()


def _private() -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["RssAnon"].split()[0])


def measured(verb: str, folder: Path, limit: float | None, group: Path | None) -> tuple[float, int]:
    """Return seconds, and the bytes of memory that the work added."""
    if group is not None:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    check(verb, folder, "small", None)
    for file in (folder / "large").glob("*.safetensors"):  # the group shall read them itself
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if group is not None:
        (group / "memory.limit_in_bytes").write_text(str(_private() + LIMIT_MIB * 2**20))
    memory, started = Memory(), time.perf_counter()
    with memory.measured():
        check(verb, folder, "large", limit)
    return time.perf_counter() - started, memory.most - memory.before


@contextmanager
def limited() -> Iterator[Path | None]:
    """Make a control group for a block; None where that is not allowed."""
    group = GROUPS / f"loraover-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def measure() -> Iterator[Table]:
    """Yield the table of checks with and without a limit."""
    table = table_of(
        "SmolLM2 in float32 from files in bf16",
        "",
        "in memory, s",
        "added MiB",
        "from files, s",
        "added MiB",
        "limit",
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        in_child(make, folder)
        for verb in VERBS:
            run = partial(in_child, measured, verb, folder)
            with limited() as group:
                cells = [run(None, None), run(MAX_MEMORY_GIB, group)]
                kept = f"{LIMIT_MIB} MiB" if group is not None else "none here"
            table.add_row(verb, *(cell for s, added in cells for cell in (f"{s:.0f}", f"{added / 2**20:.0f}")), kept)
    yield table
