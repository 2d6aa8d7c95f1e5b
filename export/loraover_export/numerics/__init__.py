"""Arithmetic that every export shares: rounding to nearest, the delta of a module, the certificate of a matrix."""
