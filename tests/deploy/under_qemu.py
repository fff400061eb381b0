"""Opens exported folders and prints, one a line as JSON, what came of each: a program for another processor."""

from __future__ import annotations

import json
import sys
import warnings

from qatlab import deploy
from qatlab.core.errors import UserError

for folder in sys.argv[1:]:
    told = ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            deploy.load(folder, threads=1)
        except UserError as error:
            told = str(error)
    print(json.dumps([folder, told]), flush=True)
