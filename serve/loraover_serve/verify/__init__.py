"""Verification: does an engine answer as an adapter was trained, and if not, which mistake explains its answers?"""
