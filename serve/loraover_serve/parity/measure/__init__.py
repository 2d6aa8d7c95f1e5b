"""Measurement: arms, blocks, memory, and the engines that answer."""
