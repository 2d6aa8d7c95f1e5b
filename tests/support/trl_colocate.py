"""TRL's GRPOTrainer with vLLM in its own process, run by the Python that has vLLM; the judge's findings as JSON.

    PYTHONPATH=ROOT:... python -m support.trl_colocate PACKAGES BASE OUTPUT FAULT

PACKAGES is the folder with TRL, which is found behind vLLM's own packages. FAULT is base, with which the engine keeps
the weights that it began with, or empty. vLLM's products for a CPU drop the weights that they have packed, so that no
sync can load others; here it multiplies by PyTorch.
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

STEPS = 6


def keep_weights() -> None:
    """Let vLLM multiply by PyTorch, by weights that a sync can replace."""
    from torch.nn.functional import linear
    from vllm.model_executor.layers import utils, vocab_parallel_embedding

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = linear

    for module in (utils, vocab_parallel_embedding):
        module.dispatch_cpu_unquantized_gemm = plain


def main(base: str, output: Path, fault: str) -> None:
    """Train for a few steps and write what the judge found at each of them into `findings.json`."""
    keep_weights()
    from trl.generation import vllm_generation

    from loraover_serve import VerifyRollouts

    from support.online_trainers import online_trainer

    vllm_generation.LLM = functools.partial(vllm_generation.LLM, enforce_eager=True)
    colocate: dict[str, Any] = {"vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.05}
    trainer = online_trainer("GRPO", Path(base), output, steps=STEPS, vllm_max_model_length=64, **colocate)
    if fault == "base":
        trainer.vllm_generation.sync_weights = lambda: None
    found = []

    class Seen(VerifyRollouts):
        def _log(self, finding: Any) -> None:
            super()._log(finding)
            found.append(asdict(finding))

    Seen(trainer, rows=16)
    trainer.train()
    (output / "findings.json").write_text(json.dumps(found, default=str))


if __name__ == "__main__":
    sys.path.append(sys.argv[1])
    main(sys.argv[2], Path(sys.argv[3]), sys.argv[4])
