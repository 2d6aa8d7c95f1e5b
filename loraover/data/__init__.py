"""Training rows, from files and hubs, in the formats that people have."""
