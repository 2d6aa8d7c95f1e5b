"""Features of an adapter that engines would refuse, or compute wrongly without a message; nothing is run."""
