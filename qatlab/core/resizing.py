"""The names of the ways to bring an image to a model's size, shared by options, weight tags and transforms."""

# The names are open_clip's, as its records of weight tags and open_clip_config.json spell them.
INTERPOLATIONS = ("bicubic", "bilinear")
RESIZE_MODES = ("shortest", "longest", "squash")
