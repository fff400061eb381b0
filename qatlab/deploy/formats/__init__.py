"""The formats of an integer model: each file here writes and runs one format."""
