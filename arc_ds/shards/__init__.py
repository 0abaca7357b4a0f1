"""Shards: format, reading (local or remote), checking, indexing, and the token caches stored next to them."""
