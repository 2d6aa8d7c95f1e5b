"""Serving parity of folded adapters."""
