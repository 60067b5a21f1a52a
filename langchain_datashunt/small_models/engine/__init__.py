"""Computation of networks: devices, tokenization, token batches and the padding-free encoder."""
