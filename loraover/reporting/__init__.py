"""Progress, HTML pages and model cards."""
