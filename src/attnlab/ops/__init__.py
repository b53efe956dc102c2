"""Functional kernels on ``(batch, heads, tokens, head_dim)`` tensors, a folder an op, a file a backend."""
