"""What the comparisons of engines share: adapters that they take, thresholds, and parts of their reports."""
