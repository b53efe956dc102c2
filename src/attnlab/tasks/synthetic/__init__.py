"""Copying, induction and retrieval: what a mechanism can carry from one place of a sequence to another."""
