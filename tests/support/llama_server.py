"""llama.cpp's server, as xllamacpp has it, until its standard input ends.

    python llama_server.py MODEL PORT [ADAPTER ...] [--cache-ram MIB]

It runs with the python that $LORAOVER_LLAMA_SERVER names, which has xllamacpp and nothing of ours.
"""

from __future__ import annotations

import argparse
import sys

import xllamacpp

parameters, parser = xllamacpp.CommonParams(), argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("port", type=int)
parser.add_argument("adapters", nargs="*")
parser.add_argument("--cache-ram", type=int, default=parameters.cache_ram_mib)
asked = parser.parse_args()
parameters.model.path, parameters.port, parameters.cache_ram_mib = asked.model, asked.port, asked.cache_ram
parameters.n_ctx, parameters.n_parallel, parameters.warmup = 4096, 4, False
parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in asked.adapters]
server = xllamacpp.Server(parameters)
sys.stdin.read()
