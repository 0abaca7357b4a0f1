"""The commands of `arc-ds`, one module per command."""
