"""Attention without a softmax over keys: a running sum of outer products, linear in the number of tokens."""
