"""Cleaning a dataset: what is malformed, duplicated, or in a test set goes, and is kept apart with the reason."""
