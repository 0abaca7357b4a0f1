"""Device, ranks, processes and files: code that depends on the machine."""
