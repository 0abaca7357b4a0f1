"""Training: engines, optimizer, the step and the loop, checkpoints, validation, tracking."""
