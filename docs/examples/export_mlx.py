"""Write an adapter for mlx-lm, and say what the base model lacks for it.

Usage: python docs/examples/export_mlx.py ADAPTER OUTPUT    (without arguments: the adapter of `make demo`)
"""

import sys

from loraover_export import export_mlx

adapter, output = sys.argv[1:] or ("runs/demo/folded", "runs/for-mlx")
report = export_mlx(adapter, output)
print(report.verdict, report.base_model, f"rank {report.rank}")
if report.lost_settings:
    print("add to the top level of the base model's config.json:", report.lost_settings)
