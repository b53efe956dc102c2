"""Attention to a neighbourhood or a part of the tokens."""
