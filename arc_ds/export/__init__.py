"""Export: convert ZeRO shards to weights that other programs can load."""
