"""Turn a PEFT adapter of any kind into a plain LoRA, and say how far it is from what was trained.

Usage: python docs/examples/convert.py ADAPTER OUTPUT    (without arguments: the adapter of `make demo`)
"""

import sys

from loraover_export import convert_adapter

adapter, output = sys.argv[1:] or ("runs/demo/lora-over/adapter", "runs/converted")
report = convert_adapter(adapter, output)
worst = max(module.relative_error_bound for module in report.certificate.modules)
print(f"{report.method} of rank {report.exact_rank}: largest relative error of a module {worst:.1e}")
