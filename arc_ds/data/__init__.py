"""Data: records, tokenizers, shards, their order, the tasks made of them, and packing."""
