"""llama.cpp's server, as xllamacpp has it, until its standard input ends: python llama_server.py MODEL PORT [ADAPTER].

It runs with the python that $LORAOVER_LLAMA_SERVER names, which has xllamacpp and nothing of ours.
"""

from __future__ import annotations

import sys

import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.port = sys.argv[1], int(sys.argv[2])
parameters.n_ctx, parameters.n_parallel, parameters.warmup = 4096, 4, False
parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in sys.argv[3:]]
server = xllamacpp.Server(parameters)
sys.stdin.read()
