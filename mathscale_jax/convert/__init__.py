"""Weights in and out: Hugging Face folders to checkpoints and back."""
