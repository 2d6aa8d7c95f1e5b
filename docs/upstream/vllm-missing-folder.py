"""An adapter that is read again from a folder that is gone raises inside a step of vLLM's engine: exit code 0 if so.

Run it by the Python of an environment that holds vLLM; it needs no GPU, no model and no server.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

from vllm import __version__
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

# The worker once held id 1, has evicted it, and its folder was deleted since; the next step has a request for it.
manager = object.__new__(LRUCacheWorkerLoRAManager)
manager.max_position_embeddings = None
manager._adapter_manager = SimpleNamespace(
    lora_slots=1, list_adapters=dict, supported_lora_modules=[], packed_modules_mapping={}
)
raised = "nothing"
try:
    manager.set_active_adapters(
        {LoRARequest("shop", 1, "/adapters/shop-1")}, None
    )  # as in GPUModelRunner.execute_model
except Exception as error:
    raised = type(error).__name__
print(f"vLLM {__version__}: set_active_adapters raises {raised}")
sys.exit(0 if raised == "LoRAAdapterNotFoundError" else 1)
