"""Suites: the image sets that a model is scored on, with their roles and zero-shot heads."""
