"""Building shards: texts, JSONL and Parquet to records, cut, filtered and written by several workers."""
