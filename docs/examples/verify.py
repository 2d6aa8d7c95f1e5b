"""Verify that an engine answers as an adapter was trained, here PyTorch with PEFT.

Usage: python docs/examples/verify.py ADAPTER OUTPUT    (without arguments: those of `make demo`)
"""

import sys

from loraover_serve import verify_adapter

adapter, output = sys.argv[1:] or ("runs/demo/lora-over/adapter", "runs/verified")
report = verify_adapter(adapter, engines=["torch"], output=output)
for engine in report.engines:
    print(f"{engine.engine}: {engine.plainly}\n  {engine.reason}")
