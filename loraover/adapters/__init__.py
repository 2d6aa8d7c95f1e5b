"""Adapters without any engine: their deltas, and plain LoRAs made from them, certified."""
