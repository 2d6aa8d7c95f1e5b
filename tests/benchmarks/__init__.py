"""Measurements of speed and memory, beside peers and physical limits."""
