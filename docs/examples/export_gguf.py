"""Write a GGUF adapter for llama.cpp, and run it there if a GGUF file of the base model is at hand.

Usage: python docs/examples/export_gguf.py ADAPTER OUTPUT [BASE]    (without arguments: the adapter of `make demo`)
"""

import sys

from loraover_export import export_gguf

adapter, output, *base = sys.argv[1:] or ("runs/demo/folded", "runs/adapter.gguf")
report = export_gguf(adapter, output, base_gguf=base[0] if base else None)
print(report.verdict if report.check is None else f"{report.verdict}: largest logit error {report.check.error:.1e}")
