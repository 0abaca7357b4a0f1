"""Start, stop and end of a run's processes."""
