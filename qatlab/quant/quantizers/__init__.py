"""Quantizers: how a tensor is rounded, how its scales are found, and the arithmetic behind both."""
