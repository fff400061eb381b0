"""A CLIP and its quantized twin: weights, preprocessing, prompts, zero-shot heads."""
