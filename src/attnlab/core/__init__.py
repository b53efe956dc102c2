"""The contract: what a token mixer is, what it promises, and how it is found by name."""
