"""Evaluation: datasets, systems, one runner, one scorer. The page is `arc_ds/evaluation/README.md`."""
