"""Adapters of any kind in the form that an engine loads, one or many, made once and kept in a cache."""
