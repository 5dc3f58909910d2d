"""Checkpoint in, numbers and pictures out: samples, grades, metrics.json, report.html.

Always `from eval.grade import …`: a bare `import eval` would hide Python's builtin.
"""
