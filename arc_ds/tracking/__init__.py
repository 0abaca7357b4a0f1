"""Metrics of a run: `metrics.jsonl` and MLflow. Tracking never slows down a run."""
