"""Adapters that let a RAG framework send its documents to `arc-ds serve`. Each module needs its framework only."""
