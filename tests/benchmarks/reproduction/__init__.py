"""Small-scale reproduction of the paper's tables and figures, see `__main__`."""
