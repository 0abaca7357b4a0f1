"""One module for each command of `arc-ds`."""
