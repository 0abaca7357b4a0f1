"""The demo: the complete pipeline on real input, and a summary of its results."""
