"""The files of a run folder: they are written here, and read here without torch."""

from qatlab.results.rows import frame, read

__all__ = ["frame", "read"]
