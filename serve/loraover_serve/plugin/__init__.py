"""vLLM's plug-in: adapters of any kind by name. It imports vLLM and the standard library; a process beside it works."""
