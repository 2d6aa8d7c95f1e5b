"""Files that pass between the stages, and the unfolded model with which exports are compared."""
