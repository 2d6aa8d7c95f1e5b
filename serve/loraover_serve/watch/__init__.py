"""A canary: it checks adapters on servers against their references again and again, and shows changes."""
