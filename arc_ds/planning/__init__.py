"""Sizes and floating-point operations of a run, computed before it starts."""
