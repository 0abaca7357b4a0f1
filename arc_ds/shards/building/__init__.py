"""Builds shards from text, JSONL and Parquet files: several workers cut and filter documents into records."""
