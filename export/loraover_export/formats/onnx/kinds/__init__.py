"""Kinds of models, one file each: how their ONNX graphs are written and run."""
