"""Inference engines that adapters are compared on."""
