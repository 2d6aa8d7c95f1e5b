"""Files that pass between the stages."""
