"""The embedded world: drawn images with captions and classes, so that everything runs without a download."""
