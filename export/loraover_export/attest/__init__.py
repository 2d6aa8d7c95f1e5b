"""A signed statement that lists an adapter's files and the checks that they passed."""
