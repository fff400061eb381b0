"""The closing line of a run of the embedded model: whether accuracy was lost, and the command to try next."""

from __future__ import annotations

from collections.abc import Sequence

from qatlab.reports.headline import last_row, verdicts
from qatlab.reports.table import adjusted
from qatlab.reports.titles import bits
from qatlab.results.rowfile import Row
from qatlab.results.stages import QUANTIZED

# Methods whose bits are those of a format; a command that sets other bits would show another method.
_FIXED_BITS = ("=FP8(", "=MX(", "=NVFP4")
# The second command of README. At four bits the embedded model loses accuracy, and training can win some of it back.
RECOVERS = (
    "python -m qatlab.fit recipe=light_qat_distill quant.weight.bits=4 quant.act.bits=4 objective.contrastive=0 "
    "objective.kl=1 fit.unique_samples=2000 fit.lr=1e-4 optim.scale_lr=1e-2 fit.schedule=cosine"
)
PICTURE = "reliability.png shows it side by side, curves.png step by step"


def next_line(rows: Sequence[Row]) -> str | None:
    """Return the closing line of a run with these rows, None where there is no next command to propose.

    A next command is known only for the embedded model on its embedded data, with bits that can be chosen and rows that
    were compared with FP32.
    """
    row = last_row(rows)
    if (
        row is None
        or row.get("model") != "tiny"
        or row.get("data") != "embedded"
        or any(format in row.get("method", "") for format in _FIXED_BITS)
        or not (found := verdicts(row, adjusted(rows)))
    ):
        return None
    if found["top1"] == "worse":
        if row["stage"] != QUANTIZED:
            return None  # this run lost accuracy and was trained: the command would show nothing new
        return (
            f"{bits(row)} cost accuracy here. A run in which training wins some of it back ({PICTURE}):\n  {RECOVERS}"
        )
    said = f"accuracy is {found['top1']}" if found["top1"] else "no loss of accuracy is shown"
    return f"At {bits(row) or 'full precision'} {said}: training has nothing to win back. At W4A4 it has ({PICTURE}):\n  {RECOVERS}"
