"""The trained compressor in use: load, compress, generate. Imports nothing of training."""
