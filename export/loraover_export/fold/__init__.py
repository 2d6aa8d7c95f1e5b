"""Folding from disk: cores into a plain adapter, its certificate, and the check of its outputs."""
