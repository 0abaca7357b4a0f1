"""Inference with a trained compressor: load, compress, generate. Imports no training code."""
