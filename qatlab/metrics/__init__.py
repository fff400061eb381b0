"""Pure functions on cosines, confidences and scores; the callbacks gather their inputs over batches and ranks."""
