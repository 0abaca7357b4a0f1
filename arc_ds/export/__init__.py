"""Export: ZeRO shards to weights that others can load."""
