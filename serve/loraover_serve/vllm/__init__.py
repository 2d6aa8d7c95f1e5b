"""A vLLM server: its start, its client, and the adapters that it serves."""
