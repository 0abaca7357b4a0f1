"""Shards elsewhere: URLs, and the bounded cache on each host."""
