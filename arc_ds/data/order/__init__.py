"""The order of the data as pure functions of seed and position."""
