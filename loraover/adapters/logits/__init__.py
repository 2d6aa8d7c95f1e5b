"""Comparison of two models by their logits: on which prompts, piece by piece, and with which verdict."""
