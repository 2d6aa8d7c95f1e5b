"""Say for each engine whether it would refuse an adapter, or apply it wrongly without a message, and what repairs that.

Usage: python docs/examples/check.py ADAPTER    (without arguments: the adapter of `make demo`)
"""

import sys

from loraover_export import check_adapter

(adapter,) = sys.argv[1:] or ("runs/demo/lora-over/adapter",)
for check in check_adapter(adapter).engines:
    print(f"{check.engine}: {check.as_it_is.verdict}" + (f"; {check.export}" if check.is_mended else ""))
