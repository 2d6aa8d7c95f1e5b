"""Training rows from files and the hub, in common formats."""
