"""Bundles: saving a small model to a folder and loading it again."""
