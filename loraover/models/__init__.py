"""Base models and tokenizers, by hub name or folder."""
