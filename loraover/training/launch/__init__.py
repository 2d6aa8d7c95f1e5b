"""Settings of a recipe's trainer, its processes and its memory, before anything large is loaded."""
