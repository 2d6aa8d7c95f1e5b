"""One OpenVINO GenAI pipeline that answers for an adapter and without it in turn; run by OpenVINO's own python.

    python openvino_pipeline.py MODEL ADAPTER PROMPT on|off    # PROMPT: token ids; the prefix cache is on or off

Prints the likeliest next tokens with their logprobs, in JSON: of the adapter, of the base model, and of the adapter.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

TOP = 5


def main(model: str, file: str, prompt: str, cache: str) -> None:
    import openvino
    import openvino_genai as genai

    adapter, scheduler = genai.Adapter(file), genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    if cache == "off":
        options["scheduler_config"] = scheduler
    pipeline = genai.LLMPipeline(model, "CPU", adapters=genai.AdapterConfig(adapter), **options)
    tokens = openvino.Tensor(np.array([json.loads(prompt)], dtype=np.int64))
    answers = []
    for adapters in (genai.AdapterConfig(adapter), genai.AdapterConfig(), genai.AdapterConfig(adapter)):
        beams = {"num_beams": TOP, "num_return_sequences": TOP, "length_penalty": 0.0}
        config = genai.GenerationConfig(ignore_eos=True, do_sample=False, max_new_tokens=1, **beams)
        config.adapters = adapters
        found = pipeline.generate(tokens, config)
        answers.append([(int(ids[0]), float(score)) for ids, score in zip(found.tokens, found.scores, strict=True)])
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
