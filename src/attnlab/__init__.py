"""attnlab: attention mechanisms under one contract."""
