"""Any adapter in the form that an engine loads, made once and kept in a cache by a digest of its sources."""
