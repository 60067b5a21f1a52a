"""How networks are computed: devices, tokenisation, batches and the padding-free encoder."""
