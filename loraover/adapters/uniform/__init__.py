"""The uniform form of an adapter, which every engine reads the same way: one rank, scaling 1, nothing but A and B."""
