"""Fold LoRA-Over checkpoints into plain LoRA adapters and certify the result."""
