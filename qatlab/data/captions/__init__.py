"""Image-caption samples from WebDataset shards: finding the shards, the order of samples, and batches for training."""
