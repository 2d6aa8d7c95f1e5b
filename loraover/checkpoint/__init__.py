"""Files that pass between the stages, and the unfolded model that proofs compare with."""
