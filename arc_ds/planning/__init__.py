"""What a run costs, counted before it starts: floating-point operations."""
