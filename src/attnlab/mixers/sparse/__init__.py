"""Attention over chosen pairs of tokens."""
