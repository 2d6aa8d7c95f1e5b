"""Adapters for llama.cpp as GGUF files, and their check in llama.cpp."""
