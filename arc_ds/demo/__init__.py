"""The demo: the whole chain on real input, and what it shows at its end."""
