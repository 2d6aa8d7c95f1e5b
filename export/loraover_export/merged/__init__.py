"""The search for an adapter in weights that any tool merged: strength, rounding and verdict of every module."""
