"""Demo command, its figures and its data."""
