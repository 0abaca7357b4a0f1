"""The work of the DataLoader's workers: from the order of the run's samples to packed batches."""
