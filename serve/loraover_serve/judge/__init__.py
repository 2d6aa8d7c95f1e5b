"""The judge of engines that serve an adapter: one for `verify` and for the checker that needs no package.

This room imports the standard library alone, and is packed into the checker as it is. It decides by measurements (see
`evidence`), which each side makes: `verify` with NumPy and PyTorch, the checker from dictionaries of logprobs.
"""
