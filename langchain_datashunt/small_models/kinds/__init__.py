"""Small model classes, one kind of model per module."""
