"""The report of a parity run: its file, its page and its tables."""
