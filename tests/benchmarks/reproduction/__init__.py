"""The paper's tables and figures, at a scale that two cores compute; see `__main__`."""
