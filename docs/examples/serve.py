"""Start vLLM with an adapter, ask it something, and stop it.

Usage: python docs/examples/serve.py ADAPTER    (without an argument: what `make demo` exported for vLLM)
"""

import sys
from pathlib import Path

from loraover_serve import serve_adapters

adapter = Path(*sys.argv[1:] or ["runs/demo/vllm"])
with serve_adapters(adapter) as server:  # an adapter is addressed by the name of its folder
    print(server.ask(adapter.name, "A farmer has 17 sheep."))
