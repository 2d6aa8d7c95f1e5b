"""Answer with a swappable ONNX graph in plain ONNX Runtime: with the base model, and each adapter beside the graph.

Usage: python docs/examples/run_onnxruntime.py GRAPH PROMPT    (without arguments: that of `make demo-parity`)
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from transformers import AutoTokenizer

QUESTION = "Question: Tom has 3 apples and buys 4. How many has he?\nAnswer:"
FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}

folder, prompt = sys.argv[1:] or ("runs/demo/swappable", QUESTION)
settings = json.loads((Path(folder) / "genai_config.json").read_text())["model"]
options = ort.SessionOptions()
options.log_severity_level = 3  # ONNX Runtime warns of every input that has a default, so of each A and each B
session = ort.InferenceSession(str(Path(folder) / settings["decoder"]["filename"]), options)
outputs = [output.name for output in session.get_outputs()]
sizes = {"batch_size": 1, "past_sequence_length": 0, "kv_cache_dim": settings["decoder"]["head_size"]}
inputs = {value.name: value for value in session.get_inputs()}
empty_cache = {
    name: np.zeros([sizes.get(size, size) for size in value.shape], FLOATS[value.type])
    for name, value in inputs.items()
    if name.startswith("past_key_values.")
}


def answer(tokens: list[int], adapter: ort.LoraAdapter | None, new_tokens: int = 16) -> list[int]:
    """Return the tokens that are likeliest one after the other; without an adapter, the base model answers."""
    run = ort.RunOptions()
    if adapter is not None:
        run.add_active_adapter(adapter)
    cache, found, ends = empty_cache, tokens, np.atleast_1d(settings["eos_token_id"])
    while len(found) < len(tokens) + new_tokens and (found == tokens or found[-1] not in ends):
        past = next(iter(cache.values())).shape[2]
        feed = {
            "input_ids": np.array([found[past:]], np.int64),
            "attention_mask": np.ones((1, len(found)), np.int64),
            "position_ids": np.arange(past, len(found), dtype=np.int64)[None],
        }
        values = session.run(outputs, {name: feed[name] for name in feed if name in inputs} | cache, run)
        by_name = dict(zip(outputs, values, strict=True))
        found = [*found, int(by_name["logits"][0, -1].argmax())]
        cache = {name: by_name[name.replace("past_key_values", "present")] for name in cache}
    return found[len(tokens) :]


tokenizer = AutoTokenizer.from_pretrained(folder)
prompted = tokenizer(prompt)["input_ids"]
print(f"base model: {tokenizer.decode(answer(prompted, None))!r}")
for path in sorted(Path(folder).glob("*.onnx_adapter")):
    loaded = ort.LoraAdapter()
    loaded.Load(str(path))
    print(f"{path.stem}: {tokenizer.decode(answer(prompted, loaded))!r}")
