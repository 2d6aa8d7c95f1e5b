"""The search for an adapter in weights that any tool has merged: strength, rounding and verdict of every module."""
