"""Contents of a folder, and abilities of this installation."""
