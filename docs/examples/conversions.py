"""Shrink an adapter, and say what each module loses and how far the result is from the original.

Usage: python docs/examples/conversions.py ADAPTER OUTPUT    (without arguments: the adapter of `make demo`)
"""

import sys

from loraover_export import diff_adapters, shrink_adapter

adapter, output = sys.argv[1:] or ("runs/demo/folded", "runs/smaller")
certificate = shrink_adapter(adapter, output, rank=2)
for module in certificate.modules:
    print(f"{module.module}: {module.truncation_error / module.norm:.1%} left out")
print(f"{diff_adapters(adapter, output).relative_difference:.1%} of the adapter's norm")
