"""A vLLM server: its start, its client, and serving until someone stops it."""
