"""Changes of a full-precision encoder that keep its outputs and make the encoder easier to quantize."""
