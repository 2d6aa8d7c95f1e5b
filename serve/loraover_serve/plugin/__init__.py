"""vLLM's plug-in: adapters of any kind by name. It needs only the standard library; a worker prepares adapters."""
