"""The bigram-backcopy language: a bigram model that a few trigger characters interrupt."""
