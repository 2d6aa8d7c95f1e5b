"""Progress, report pages with their figures, and model cards."""
