"""The judge of engines that serve an adapter: one for `verify` and for the checker that needs no package.

This room imports the standard library alone, and is packed into the checker as it is. It compares an engine's
answers with those of models (`models`). A reference holds these (`reference`), or PyTorch computes them on demand.
"""
