"""Fold a checkpoint into a plain LoRA, and compare its logits with those of the unfolded model.

Usage: python docs/examples/fold.py CHECKPOINT OUTPUT    (without arguments: the checkpoint of `make demo`)
"""

import sys

from loraover_export import fold_checkpoint

checkpoint, output = sys.argv[1:] or ("runs/demo/lora-over/adapter", "runs/folded")
certificate = fold_checkpoint(checkpoint, output, dtype="bf16", check_error=True)
print(f"{certificate.verdict}: {len(certificate.matrices)} matrices")  # if it failed, nothing was written
