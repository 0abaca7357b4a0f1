"""The systems that answer prompts. `system.py` has their interface."""
