"""What the comparisons of engines share: adapters that they take, number formats, and parts of their reports."""
