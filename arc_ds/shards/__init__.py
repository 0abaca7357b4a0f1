"""Shards: the format, reading them from anywhere, checking and indexing them, and the token caches beside them."""
