"""Benchmarks of a base model and its adapters, side by side."""
