"""Memories that are written while they are read, and attention around them."""
