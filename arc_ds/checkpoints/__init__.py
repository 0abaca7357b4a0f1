"""Checkpoints: written whole or not at all, verified before they are read, cut anew for another world size."""
