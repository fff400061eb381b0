"""Evaluations: each is fed with the embedded batches of a pass over a suite and gives rows at its end."""

from qatlab.callbacks.calibration import Calibration
from qatlab.callbacks.ood import OOD
from qatlab.callbacks.predictions import Predictions
from qatlab.callbacks.progress import ProgressLines
from qatlab.callbacks.results import Results
from qatlab.callbacks.temperature import Temperature

__all__ = ["OOD", "Calibration", "Predictions", "ProgressLines", "Results", "Temperature"]
