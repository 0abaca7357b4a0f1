"""Checkpoints: written atomically, verified before loading, resharded for another world size."""
