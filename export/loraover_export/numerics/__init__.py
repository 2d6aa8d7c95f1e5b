"""Arithmetic that all exports share: rounding to nearest, the delta of a module, the certificate of a matrix."""
