"""The contract between data and model: segments, groups, and the packed batch. Needs torch and numpy only."""
