"""Kinds of models that ONNX graphs are written for."""
