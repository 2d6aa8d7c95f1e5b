"""Measurements for a machine with one CUDA GPU, which `make gpu` takes, and their page."""
