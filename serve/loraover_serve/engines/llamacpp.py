"""llama.cpp in this process; the exports check themselves with the same class."""

from loraover_export.gguf.llamacpp import LlamaCpp

__all__ = ["LlamaCpp"]
