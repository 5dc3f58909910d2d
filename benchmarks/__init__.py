"""What is measured, and results/<model>_<hardware>_<date>.md."""
