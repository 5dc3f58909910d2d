"""Runnable configurations, one YAML file each."""
