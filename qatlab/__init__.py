"""qatlab quantizes CLIP's image encoder and measures what that does beyond accuracy."""

from importlib import import_module
from pathlib import Path
from typing import Any

# In a checkout, callbacks/, recipes/ and slurm/ lie beside this package and are imported as qatlab.callbacks and so on.
_root = Path(__file__).resolve().parent.parent
if (_root / "callbacks").is_dir() and (_root / "recipes").is_dir():
    __path__.append(str(_root))

__version__ = "0.1.0"

# The names of qatlab.api, which are imported when one of them is used: torch alone takes seconds.
__all__ = [
    "FinishedRun",
    "UserError",
    "__version__",
    "embed",
    "execute",
    "features",
    "load_clip",
    "load_export",
    "load_quantized",
    "load_suite",
    "open_run",
    "options",
    "pixels",
    "quantize_model",
    "read_results",
    "score_images",
    "score_zero_shot",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'qatlab' has no attribute '{name}'")
    return getattr(import_module("qatlab.api"), name)


def __dir__() -> list[str]:
    return __all__
