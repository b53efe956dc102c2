"""Learning in context: classes and linear functions that a sequence's examples define."""
