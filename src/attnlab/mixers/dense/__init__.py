"""Every query against every key."""
