"""Integer models: exported from a run, checked against its simulation, and run without it."""

from qatlab.deploy.runtimes import load

__all__ = ["load"]
