"""Formats of adapters that engines read, each with what its engine refuses: a small one is a file, others a folder."""
