"""A canary: adapters on servers are checked by their references again and again, and a change is shown."""
