"""Statistical tests of times and of answers."""
