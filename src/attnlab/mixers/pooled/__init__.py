"""A few summaries stand between queries and keys."""
