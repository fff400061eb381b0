"""Image sets on disk: the layouts that can be read, and how the labels of images are found."""
