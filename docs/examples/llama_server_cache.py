"""Let an adapter's reference tell whose keys and values llama-server continues: its cache knows tokens, not adapters.

First with llama-server's cache of prompts in the host's memory, which is on by default, and then without it.

Usage: python docs/examples/llama_server_cache.py ADAPTER BASE.gguf OUTPUT    (ADAPTER: after `loraover record --long`)

$LORAOVER_LLAMA_SERVER is the Python of an environment with xllamacpp, which has the server (`make llama-server`).
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from loraover.client.endpoint import Endpoint
from loraover_export import export_gguf
from loraover_serve import verify_adapter

SERVER = """
import sys, xllamacpp
asked = xllamacpp.CommonParams()
asked.model.path, asked.port, asked.cache_ram_mib = sys.argv[1], int(sys.argv[3]), int(sys.argv[4])
asked.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(sys.argv[2], 1.0)]
asked.n_ctx, asked.n_parallel = 4096, 4
server = xllamacpp.Server(asked)
sys.stdin.read()
"""

adapter, base, output = map(Path, sys.argv[1:])
with socket.create_server(("127.0.0.1", 0)) as probe:
    port = probe.getsockname()[1]
endpoint = Endpoint(f"http://127.0.0.1:{port}")
reports = {}
with tempfile.TemporaryDirectory() as scratch:
    served = Path(scratch) / "adapter.gguf"
    export_gguf(adapter, served)
    for kind, cache_mib in (("stock", 8192), ("without-cache-ram", 0)):
        print(f"{kind}: starting llama-server with --cache-ram {cache_mib}, and checking its answers", flush=True)
        command = [os.environ["LORAOVER_LLAMA_SERVER"], "-c", SERVER, base, served, port, cache_mib]
        log = (Path(scratch) / f"{kind}.log").open("wb")
        server = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=log, stderr=log)
        try:
            while not endpoint.page("/props"):
                assert server.poll() is None, Path(log.name).read_text(errors="replace")[-2000:]
                time.sleep(0.5)
            report = reports[kind] = verify_adapter(
                references=[adapter / "adapter_reference.json.gz"],
                endpoint=endpoint.url,
                served_name=["0"],  # llama-server's number of the adapter
                protocol="llama-server",
                served_format="int4" if "Q4" in base.name else "bf16",
                caches=True,
                repeats=1,
                without_template=True,
                timeout_s=600,
                output=output / kind,
            )
        finally:
            server.kill()
            server.wait()
        print(f"{kind}: {report.engines[0].plainly}", flush=True)
