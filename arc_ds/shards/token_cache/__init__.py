"""The token cache: the token ids of every record, in files next to the shards."""
