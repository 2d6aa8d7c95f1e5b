"""What verify says of servers whose adapters change, and what happens with our plug-in: `docs/servers-in-motion.md`.

`make motion` names a file in LORAOVER_MOTION, runs the tests that record what they found, and renders the file. Without
the variable, tests record nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loraover.common.atomic_output import publish_text

VARIABLE = "LORAOVER_MOTION"

INTRODUCTION = """# Servers in motion

This page shows what happens when adapters change while a server runs: what `loraover verify --caches` says about the
answers afterwards, for stock vLLM and for vLLM with [the plug-in](how-to/serve-any-adapter.md). `make motion` writes
this page: a tiny random Llama in float32 on a CPU, vLLM {vllm} with its prefix cache on, and llama.cpp's
server. Before each row, the server answers with an earlier version or another model, and caches its keys and values.

{rows}

A dash means: not run. The plug-in is for vLLM only, and does not change chat templates.

## An hour of reloads

The test has {adapters} adapters and {clients} clients. Every second, one adapter gets a new version; two adapters fit
into a batch. Before a version is written, PyTorch answers each prompt with it. Each answer of the server is assigned
to the model whose logprobs are nearest, if they are within {same:g} nats. An answer of *no version* comes from new
weights on keys and values of old weights, or from the base model with a part of an adapter.

{churned}

*versions* counts the versions that were written, *served* those that the plug-in served: it skips a version that is
overwritten before it is prepared. An answer is assigned to a model only if this model is nearer than every other model.
The assignment is least certain where another model is almost as near.

{words}

`make motion` runs each server for a minute; the hour is from
`cd tests && ../.venv/bin/python -m benchmarks.churn 3600`. On an idle machine, 400 versions with five requests each
added 4.1 MiB to vLLM's worker with the plug-in, and 3.3 MiB without it and with new folders
(`python -m benchmarks.churn_memory`).
"""

REWRITTEN, IN_PLACE, READ_AGAIN, NEW_PATH = "rewritten", "in place", "read again", "new path"
BESIDE, MIXED, GONE, TORN, LOST = "beside", "mixed", "gone", "torn", "lost"
SYSTEM = "system"
HOST_CACHE, GLOBAL_SCALE = "host cache", "global scale"
VERIFY, PLUGIN = "verify", "plug-in"
"""Columns."""

ACTIONS = {
    REWRITTEN: ("vLLM", "the folder is rewritten, and the name unloaded and loaded under the same path"),
    IN_PLACE: ("vLLM", "the folder is rewritten, and loaded with `load_inplace` under the same path"),
    READ_AGAIN: ("vLLM", "the folder is rewritten, and nothing is sent; the adapter is evicted and read again"),
    NEW_PATH: (
        "vLLM",
        "the new version is loaded under the same name from another path, and asked in turn with the base model and "
        "another adapter",
    ),
    BESIDE: ("vLLM", "a name is unloaded and loaded again while requests for it run"),
    MIXED: ("vLLM", "requests for the base model run beside those for an adapter"),
    GONE: ("vLLM", "an adapter's folder is gone when it is read again after an eviction"),
    TORN: ("vLLM", "an adapter's folder is half written when it is read again after an eviction"),
    LOST: ("vLLM", "the plug-in's own copy is gone when it is read again after an eviction"),
    SYSTEM: ("vLLM", "the server's chat template has another system prompt"),
    HOST_CACHE: ("llama-server", "the base model gets a prompt that the adapter has read, after other prompts"),
    GLOBAL_SCALE: (
        "llama-server",
        "`POST /lora-adapters` turns the adapter off after it has read a prompt, and requests name none",
    ),
}
"""Rows of the table: the server, and what is done."""


def record(row: str, column: str, said: str) -> None:
    """Keep a cell of the table in the file that LORAOVER_MOTION names."""
    _keep("rows", f"{row}/{column}", said)


def record_churn(kind: str, found: Mapping[str, Any]) -> None:
    """Keep what was found while adapters changed, as `benchmarks.churn` writes it."""
    _keep("churned", kind, dict(found))


def record_version(version: str) -> None:
    """Keep vLLM's version."""
    _keep("versions", "vllm", version)


def _keep(kind: str, key: str, value: object) -> None:
    name = os.environ.get(VARIABLE)
    if not name:
        return
    path = Path(name)
    with path.with_suffix(".lock").open("w") as lock:  # parallel workers record in one file
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = json.loads(path.read_text()) if path.exists() else {}
        entries.setdefault(kind, {})[key] = value
        publish_text(path, json.dumps(entries, indent=1) + "\n")


def page(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page in Markdown."""
    from benchmarks.churn import ADAPTERS, CLIENTS, SAME, Found, to_table
    from benchmarks.shown import to_markdown

    churned = [Found.read(each) for each in entries.get("churned", {}).values()]
    return INTRODUCTION.format(
        vllm=entries.get("versions", {}).get("vllm", "(not run)"),
        rows="\n".join(_rows(entries.get("rows", {}))),
        adapters=ADAPTERS,
        clients=CLIENTS,
        same=SAME,
        churned=to_markdown(to_table(churned)),
        words="\n".join(f"- {each.words()}" for each in churned),
    )


def _rows(cells: Mapping[str, str]) -> Iterator[str]:
    yield "| server | what is done | verify says | with the plug-in |"
    yield "| --- | --- | --- | --- |"
    for name, (server, action) in ACTIONS.items():
        found = (cells.get(f"{name}/{column}", "-") for column in (VERIFY, PLUGIN))
        yield f"| {server} | {action} | {' | '.join(found)} |"


if __name__ == "__main__":
    print(page(json.loads(Path(sys.argv[1]).read_text())), end="")
