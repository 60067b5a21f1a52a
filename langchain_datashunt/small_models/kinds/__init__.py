"""The kinds of small models, one module each."""
