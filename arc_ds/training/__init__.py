"""Training: engines, optimizer, step, loop, checkpoints, validation and tracking."""
