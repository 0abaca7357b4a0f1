"""Device, ranks, processes and files: everything that depends on the machine."""
