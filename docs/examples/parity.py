"""Measure whether a folded adapter is as fast as a plain LoRA of the same shapes, here on PyTorch.

Usage: python docs/examples/parity.py ADAPTER CHECKPOINT OUTPUT    (without arguments: those of `make demo-parity`)
"""

import sys

from loraover_serve import measure_parity

adapter, checkpoint, output = sys.argv[1:] or ("runs/demo/folded", "runs/demo/lora-over/adapter", "runs/parity")
report = measure_parity(adapter, checkpoint=checkpoint, engines=["torch"], num_prompts=40, output=output)
print(f"{report.verdict}: {report.reason}")
