"""Layers that hold quantizers, and the conversion of a model to them and back."""
