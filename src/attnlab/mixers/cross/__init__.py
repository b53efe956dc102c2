"""Attention between two sets of tokens."""
