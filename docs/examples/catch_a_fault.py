"""Replace a served adapter by its next version, on vLLM as it comes and with the plug-in, and check the answers.

Each server answers questions with the earlier version of an adapter. Then the next version is written into the same
folder, and the server is told to load the folder again. The adapter's reference tells what it answers after that.

Usage: python docs/examples/catch_a_fault.py ADAPTER EARLIER OUTPUT

ADAPTER is a plain LoRA, after `loraover record ADAPTER --long --earlier EARLIER`. vLLM's environment has this package.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from loraover_serve import VerifyReport, VllmServer, serve_adapters, verify_adapter
from loraover_serve.judge.reference import read_reference

NAME = "demo"
OPTIONS = ("--dtype=float32", "--enforce-eager", "--enable-prompt-tokens-details")
os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"  # vLLM's own switch for adapters that are loaded while it runs

adapter, earlier, output = map(Path, sys.argv[1:])
reference = adapter / "adapter_reference.json.gz"
long = read_reference(reference).caches
assert long is not None, f"{reference} has no long questions: record it with --long and --earlier"


def write(version: Path, folder: Path) -> None:
    """Write a version of the adapter into the folder that is served."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(version / file, folder)


def replace_and_check(server: VllmServer, folder: Path, kind: str) -> VerifyReport:
    """Replace the earlier version under its name and path, and check what the server answers.

    The report is written to OUTPUT/kind.
    """
    print(f"{kind}: asking for the earlier version, replacing it, and checking the answers", flush=True)
    for question in long.questions:  # what users do: the server keeps keys and values of their prompts
        server.complete(NAME, question.tokens, max_tokens=1)
    write(adapter, folder)
    server.unload_adapter(NAME)
    server.load_adapter(NAME, folder)
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
    return report


with tempfile.TemporaryDirectory() as scratch:
    print("stock: starting vLLM as it comes", flush=True)
    live = Path(scratch) / "stock"
    write(earlier, live / NAME)
    with serve_adapters([live / NAME], options=OPTIONS) as server:
        stock = replace_and_check(server, live / NAME, "stock")
    print("plug-in: starting vLLM with the plug-in", flush=True)
    live = Path(scratch) / "plug-in"
    write(earlier, live / NAME)
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    with serve_adapters(folder=live, model=base, cache=Path(scratch) / "cache", options=OPTIONS) as server:
        cured = replace_and_check(server, live / NAME, "plug-in")
