"""Comparison of two models by their logits: the prompts, the computation piece by piece, and the verdict."""
