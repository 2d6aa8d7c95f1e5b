"""Write an adapter that vLLM, SGLang and PEFT read alike, after a check against vLLM's loading rules.

Usage: python docs/examples/export_vllm.py ADAPTER OUTPUT    (without arguments: the folded adapter of `make demo`)
"""

import sys

from loraover_export import export_vllm

adapter, output = sys.argv[1:] or ("runs/demo/folded", "runs/for-vllm")
report = export_vllm(adapter, output, dtype="bf16")
print(report.serve if report.passed else report.preflight)  # the command that serves it, or what stands against it
