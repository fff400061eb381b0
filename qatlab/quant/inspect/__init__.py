"""Inspection of a quantized model: which quantizers ran, what is rounded, and the error of each layer."""
