"""The reference of an adapter: recorded once with PyTorch, and enough to check any server without it."""
