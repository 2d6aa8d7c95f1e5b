"""A grid of methods, learning rates and seeds, and what it says."""
