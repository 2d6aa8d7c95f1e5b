"""Parts that the comparisons of engines share: adapters that they take, and number formats."""
