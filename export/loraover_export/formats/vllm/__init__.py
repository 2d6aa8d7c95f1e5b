"""Adapters that vLLM, SGLang and PEFT read identically."""
