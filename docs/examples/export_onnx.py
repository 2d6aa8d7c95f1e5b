"""Write an ONNX graph whose LoRA adapters can be swapped at run time, checked against the PyTorch reference.

Usage: python docs/examples/export_onnx.py CHECKPOINT OUTPUT    (without arguments: the checkpoint of `make demo`)
"""

import sys

from loraover_export import export_onnx

checkpoint, output = sys.argv[1:] or ("runs/demo/lora-over/adapter", "runs/onnx")
report = export_onnx([checkpoint], output, mode="swappable")
print(f"{report.verdict}: {', '.join(report.adapters)}")
