"""A signed statement of what an adapter's files are, and of the checks that they passed."""
