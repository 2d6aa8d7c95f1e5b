"""Many adapters at once: each is checked or prepared, and one that fails ends nothing."""
