"""Answer with an exported ONNX graph in onnxruntime-genai: with the base model, and with each adapter beside the graph.

Usage: python docs/examples/run_onnx.py GRAPH PROMPT    (without arguments: the swappable graph of `make demo-parity`)
"""

import sys
from pathlib import Path

import onnxruntime_genai as og
from transformers import AutoTokenizer

QUESTION = "Question: Tom has 3 apples and buys 4. How many has he?\nAnswer:"

folder, prompt = sys.argv[1:] or ("runs/demo/swappable", QUESTION)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = og.Model(folder)
adapters = og.Adapters(model)
names = [path.stem for path in sorted(Path(folder).glob("*.onnx_adapter"))]
for name in names:
    adapters.load(f"{folder}/{name}.onnx_adapter", name)

tokens = tokenizer(prompt)["input_ids"]
for name in (None, *names):
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(tokens) + 16, do_sample=False)
    generator = og.Generator(model, parameters)
    if name is not None:
        generator.set_active_adapter(adapters, name)  # before the first tokens
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    answer = tokenizer.decode(generator.get_sequence(0)[len(tokens) :])
    print(f"{name or 'base model'}: {answer!r}")
