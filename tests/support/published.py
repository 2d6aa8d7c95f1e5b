"""Rows in the columns of the hub's data sets, and models of the kinds that the published recipes name."""

from __future__ import annotations

from typing import Any

TEXT = "in spring a farmer sells 3 eggs"
SLICES: dict[str, dict[str, Any]] = {
    "glue-mnli-t5-base": {"premise": TEXT, "hypothesis": "no eggs", "label": 2},
    "glue-sst2-t5-base": {"sentence": TEXT, "label": 1},
    "glue-cola-t5-base": {"sentence": TEXT, "label": 1},
    "glue-qnli-t5-base": {"question": "what is sold?", "sentence": TEXT, "label": 0},
    "glue-mrpc-t5-base": {"sentence1": TEXT, "sentence2": "eggs are sold", "label": 1},
    "metamath-gsm8k": {"type": "GSM_SV", "query": TEXT, "response": "it is 3.\n#### 3\nThe answer is: 3"},
    "codefeedback-humaneval": {"query": TEXT, "answer": "so:\n```python\nx = 3\n```\nbye"},
    "wizardlm-mtbench": {"instruction": TEXT, "output": "it sells 3."},
}
LLAMA_2: dict[str, Any] = {"num_key_value_heads": 4}  # as many as query heads
LLAMA_3_1: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}
