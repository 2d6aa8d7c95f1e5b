"""Is a folded adapter served at the cost of a vanilla one? A paired benchmark with an equivalence test."""
