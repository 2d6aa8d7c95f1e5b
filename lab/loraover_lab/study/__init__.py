"""Comparison of methods over learning rates and seeds."""
