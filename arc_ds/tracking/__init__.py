"""Metrics of a run: `metrics.jsonl`, and MLflow, which never slows a run."""
