"""qatlab quantizes CLIP's image encoder and measures what that does beyond accuracy."""

from pathlib import Path

# In a checkout, callbacks/, recipes/ and slurm/ lie beside this package and are imported as qatlab.callbacks and so on.
_root = Path(__file__).resolve().parent.parent
if (_root / "callbacks").is_dir() and (_root / "recipes").is_dir():
    __path__.append(str(_root))

__version__ = "0.1.0"
