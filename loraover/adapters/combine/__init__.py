"""Adapters made from adapters by their factors alone: weighted sums, smaller ranks, and comparisons."""
