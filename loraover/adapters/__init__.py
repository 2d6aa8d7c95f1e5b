"""Deltas of adapters, and certified plain LoRAs made from adapters; no inference engine is needed."""
