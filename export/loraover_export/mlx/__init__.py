"""Adapters for mlx-lm."""
