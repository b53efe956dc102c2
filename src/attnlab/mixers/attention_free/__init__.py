"""Mixing without attention and without learned kernels."""
