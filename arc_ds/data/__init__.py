"""Data: the order of the run's samples, tasks, and loading (README.md)."""
