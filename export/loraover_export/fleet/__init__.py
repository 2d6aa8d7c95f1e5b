"""Many adapters at once: each is checked or prepared, and one that fails does not stop the others."""
