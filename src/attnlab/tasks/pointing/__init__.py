"""Answers that are positions of the input: orders, hulls, triangulations and tours."""
