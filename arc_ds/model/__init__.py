"""The ARC model: backbone, encoder, pooling, markers, bridges, frozen decoders, and how they are wired."""
