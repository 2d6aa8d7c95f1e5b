"""Replace a served adapter by its next version, on vLLM as it comes or with the plug-in, and check the answers.

The server answers questions with the earlier version of an adapter. Then the next version is written into the same
folder, and the server is told to load the folder again. The adapter's reference tells what it answers after that.

Usage: python docs/examples/catch_a_fault.py ADAPTER EARLIER OUTPUT stock|plug-in

ADAPTER is a plain LoRA, after `loraover record ADAPTER --long --earlier EARLIER`. For plug-in, vLLM's environment has
this package. OUTPUT gets the folder stock or plug-in with the report of the check, and the server's log beside it.
"""

import json
import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from loraover.adapters.uniform.request_fields import max_lora_rank
from loraover_serve import serve_adapters, verify_adapter
from loraover_serve.judge.reference import read_reference
from loraover_serve.vllm.server import free_port

NAME = "demo"
OPTIONS = [
    *("--dtype=float32", "--enforce-eager", "--enable-prompt-tokens-details"),
    "--max-num-batched-tokens=1024",  # vLLM computes a batch of this size when it starts
]
os.environ |= {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",  # vLLM's own switch for adapters that are loaded while it runs
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all servers of a machine compute on the same cores
    "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2)),  # two servers run side by side
    "TORCHDYNAMO_DISABLE": "1",  # nothing is compiled at the first answer
}

adapter, earlier, output = map(Path, sys.argv[1:4])
kind = sys.argv[4]
assert kind in ("stock", "plug-in"), f"{kind} is neither stock nor plug-in"
reference = adapter / "adapter_reference.json.gz"
long = read_reference(reference).caches
assert long is not None, f"{reference} has no long questions: record it with --long and --earlier"


def write(version: Path, folder: Path) -> None:
    """Write a version of the adapter into the folder that is served."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(version / file, folder)


output.mkdir(parents=True, exist_ok=True)
with tempfile.TemporaryDirectory() as scratch:
    print(f"{kind}: starting vLLM", flush=True)
    live = Path(scratch) / "live"
    write(earlier, live / NAME)
    start = partial(serve_adapters, options=OPTIONS, port=free_port("127.0.0.1"), log=output / f"{kind}.log")
    config = json.loads((adapter / "adapter_config.json").read_text())
    plugged = {
        "folder": live,
        "model": config["base_model_name_or_path"],
        "cache": Path(scratch) / "cache",
        "max_lora_rank": max_lora_rank(config["r"]),  # vLLM on a CPU computes each adapter at this rank
    }
    with start([live / NAME]) if kind == "stock" else start(**plugged) as server:
        print(f"{kind}: asking for the earlier version, replacing it, and checking the answers", flush=True)
        for question in long.questions:  # what users do: the server keeps keys and values of their prompts
            server.complete(NAME, question.tokens, max_tokens=1)
        write(adapter, live / NAME)
        server.unload_adapter(NAME)
        server.load_adapter(NAME, live / NAME)
        report = verify_adapter(
            references=[reference],
            endpoint=server.url,
            served_name=[NAME],
            caches=True,
            repeats=1,  # there is one server behind the address
            without_mixed=True,  # vLLM 0.32 on a CPU answers batches for both models wrongly, which a whole check shows
            without_template=True,
            timeout_s=600,
            output=output / kind,
        )
        print(f"{kind}: {report.engines[0].plainly}", flush=True)
