"""llama-server gives a model keys and values that an adapter has computed: exit code 0 if so.

llama-server -m MODEL.gguf --lora ADAPTER.gguf
python llamacpp-host-prompt-cache.py http://localhost:8080
"""

from __future__ import annotations

import json
import sys
import urllib.request
from typing import Any

PROMPT = [3 + i * i % 29 for i in range(300)]


def ask(prompt: list[int], scale: float, slot: int = -1, is_cached: bool = True) -> Any:
    """Answer to a prompt with the adapter times a scale."""
    lora = [{"id": 0, "scale": scale}]
    body = {"prompt": prompt, "lora": lora, "id_slot": slot, "cache_prompt": is_cached, "n_predict": 1, "n_probs": 20}
    request = urllib.request.Request(sys.argv[1] + "/completion", json.dumps(body).encode())
    return json.load(urllib.request.urlopen(request))


def logprobs(answer: Any) -> dict[int, float]:
    """Logprobs of the likeliest first tokens of an answer."""
    return {each["id"]: each["logprob"] for each in answer["completion_probabilities"][0]["top_logprobs"]}


slots = json.load(urllib.request.urlopen(sys.argv[1] + "/props"))["total_slots"]
right = logprobs(ask(PROMPT, 0.0, is_cached=False))
ask(PROMPT, 1.0)
for slot in range(slots):  # other prompts take every slot, and what was in it goes to the host's memory
    ask([40 + slot, *PROMPT[::-1]], 0.0, slot)
warm = ask(PROMPT, 0.0)
read = logprobs(warm)
off = max(abs(read[each] - right[each]) for each in read.keys() & right.keys())
print(f"{warm['timings']['cache_n']} tokens came from the cache, and the base model's answer is {off:.2g} nats off")
sys.exit(0 if off > 0.01 else 1)
