"""Places that adapters and models are taken from: a folder, a name on the hub, or an address."""
