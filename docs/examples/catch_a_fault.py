"""Serve an adapter on vLLM beside a copy of it whose scaling was lost, and let the adapter's reference tell them apart.

Usage: python docs/examples/catch_a_fault.py ADAPTER OUTPUT    (ADAPTER: a plain LoRA, after `loraover record`)
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from loraover_serve import serve_adapters, verify_adapter

adapter, output = map(Path, sys.argv[1:])
with tempfile.TemporaryDirectory() as scratch:
    lost = Path(scratch) / f"{adapter.name}-scaling-lost"
    shutil.copytree(adapter, lost, ignore=shutil.ignore_patterns("adapter_reference*"))
    config = json.loads((lost / "adapter_config.json").read_text())
    assert config["lora_alpha"] != config["r"], "this adapter has a scaling of 1, which cannot be lost"
    (lost / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["r"]}))  # a scaling of 1
    options = ["--dtype=float32", "--enforce-eager", "--block-size=32"]  # vLLM reuses whole blocks of a prompt
    with serve_adapters([adapter, lost], options=options) as server:
        report = verify_adapter(
            references=2 * [adapter / "adapter_reference.json.gz"],
            endpoint=server.url,
            served_name=[adapter.name, lost.name],
            repeats=1,  # there is one server behind the address
            without_mixed=True,  # vLLM 0.32 on a CPU answers batches for both models wrongly, which a whole check shows
            timeout_s=600,
            output=output,
        )
for served in report.engines:
    print(f"{served.engine}: {served.plainly}\n  {served.reason}")
