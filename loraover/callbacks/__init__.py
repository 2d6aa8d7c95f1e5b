"""Callbacks for the Hugging Face trainers."""
