"""Serving one small model to many callers: dynamic batching and caches."""
