"""What each engine would refuse in an adapter, and what it would compute wrongly without a message; nothing is run."""
