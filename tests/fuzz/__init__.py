"""A generator of adapters that looks for wrong exports, with PEFT's own forward in float64 as the oracle."""
