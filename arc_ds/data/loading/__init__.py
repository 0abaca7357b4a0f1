"""From the order of the run's samples to packed batches: what the DataLoader's workers do."""
