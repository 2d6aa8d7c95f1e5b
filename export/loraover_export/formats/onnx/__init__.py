"""ONNX graphs with an adapter merged into them or swapped in at run time, checked in ONNX Runtime."""
