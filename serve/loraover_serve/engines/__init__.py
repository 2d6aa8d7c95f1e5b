"""Inference engines that adapters are compared on."""

ENGINES = ("vllm", "onnx", "torch")
"""Names of the engines, as `--engine` and `measure_parity` take them."""
