"""The models that checks compare with: the unfolded model of a checkpoint, and PEFT's own of a plain adapter."""
