"""The judge of engines that serve an adapter: one for `verify` and for the checker that needs no package.

This room imports the standard library alone, and is packed into the checker as it is. It decides by an engine's answers
beside models (`models`), which a reference holds (`reference`), or PyTorch runs when they are asked for.
"""
