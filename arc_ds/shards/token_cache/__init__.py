"""The token cache: every record's ids, next to the shards."""
