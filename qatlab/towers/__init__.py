"""The parts of an encoder, a file for each family: its blocks, norms, projections, attention and patch tokens."""
