"""Attention inside the parts of a partition: groups, bins, views, and tokens of two levels."""
