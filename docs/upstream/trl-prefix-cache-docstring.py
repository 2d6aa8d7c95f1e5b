"""vLLM keys its prefix cache by an adapter's name and path, not by the name alone: exit code 0 if so.

Run it by the Python of an environment that holds vLLM; it needs no GPU, no model and no server.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

from vllm import __version__
from vllm.lora.request import LoRARequest
from vllm.v1.core.kv_cache_utils import _gen_lora_extra_hash_keys


def keys(name: str, path: str) -> list[str]:
    """What an adapter adds to the keys of its blocks."""
    return _gen_lora_extra_hash_keys(SimpleNamespace(lora_request=LoRARequest(name, 1, path)))


first = keys("policy", "/adapters/v1")
of_path, of_name = (first != other for other in (keys("policy", "/adapters/v2"), keys("other", "/adapters/v1")))
print(f"vLLM {__version__}: another path changes the keys: {of_path}; another name changes them: {of_name}")
sys.exit(0 if of_path and of_name else 1)
