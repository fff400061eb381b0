"""Post-training quantization: scales found from images, without training."""
