from callbacks import *  # noqa: F403  (for editors only: the package is imported as qatlab.callbacks)
