"""Arithmetic that all exports share: rounding, the delta of a module, certificates, and adapters rounded once."""
