"""The evaluations of a suite, and the callbacks that watch a training or write its checkpoints."""

from qatlab.callbacks.calibration import Calibration
from qatlab.callbacks.checkpoints import Checkpoints
from qatlab.callbacks.curves import Curves
from qatlab.callbacks.ood import OOD
from qatlab.callbacks.predictions import Predictions
from qatlab.callbacks.profile import Profile
from qatlab.callbacks.progress import ProgressLines
from qatlab.callbacks.refits import Refits
from qatlab.callbacks.results import Results
from qatlab.callbacks.spurious import Spurious
from qatlab.callbacks.temperature import Temperature

__all__ = [
    "OOD",
    "Calibration",
    "Checkpoints",
    "Curves",
    "Predictions",
    "Profile",
    "ProgressLines",
    "Refits",
    "Results",
    "Spurious",
    "Temperature",
]
