"""Base models and tokenizers: by hub name, folder or packaged copy."""
