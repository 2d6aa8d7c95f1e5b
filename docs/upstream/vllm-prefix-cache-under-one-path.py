"""Two versions of an adapter under one name and path have the same keys in vLLM's prefix cache: exit code 0 if so.

Run it by the Python of an environment that holds vLLM; it needs no GPU, no model and no server.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from vllm import __version__
from vllm.lora.request import LoRARequest
from vllm.v1.core.kv_cache_utils import _gen_lora_extra_hash_keys

with tempfile.TemporaryDirectory() as folder:
    weights, keys = Path(folder, "adapter_model.safetensors"), []
    for number, content in enumerate((b"weights of version 1", b"weights of version 2"), 1):
        weights.write_bytes(content)  # the server unloads the adapter, and loads the path again under a new id
        keys.append(_gen_lora_extra_hash_keys(SimpleNamespace(lora_request=LoRARequest("shop", number, folder))))
is_shared = keys[0] == keys[1]
print(f"vLLM {__version__}: the blocks of both versions have {'the same keys' if is_shared else 'keys of their own'}")
sys.exit(0 if is_shared else 1)
