"""The ARC model: backbone, encoder, pooling, markers, bridges and frozen decoders."""
