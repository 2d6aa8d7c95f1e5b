"""Two versions of an adapter under one name are one element of a set in vLLM: exit code 0 if so.

Run it by the Python of an environment that holds vLLM; it needs no GPU, no model and no server.
"""

from __future__ import annotations

import sys

from vllm import __version__
from vllm.lora.request import LoRARequest

# A request for "shop" still runs with id 1 while "shop" is unloaded, loaded again as id 2, and asked.
running = {1: LoRARequest("shop", 1, "/adapters/shop-1"), 2: LoRARequest("shop", 2, "/adapters/shop-2")}
activated = {request.lora_int_id for request in set(running.values())}  # as in InputBatch.make_lora_inputs
lost = running.keys() - activated
print(f"vLLM {__version__}: {f'id {lost} runs but is not activated' if lost else 'all running ids are activated'}")
sys.exit(0 if lost else 1)
