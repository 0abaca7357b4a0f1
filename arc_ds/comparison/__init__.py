"""Comparison of runs: tables, plots and an offline page. `arc-ds compare` is its command."""
