"""The numbers of the full table by name, as loggers need them to compare runs."""

from __future__ import annotations

from collections.abc import Sequence

from qatlab.reports.columns import grid
from qatlab.reports.table import specs
from qatlab.reports.titles import measure
from qatlab.results.rowfile import Row
from qatlab.results.stages import TITLES


def table_numbers(rows: Sequence[Row]) -> dict[str, float]:
    """Return {"<set>/<line>/<stage>": number} of the rows of one run, with the units and names of the table.

    A line of several metrics gives a number for each metric, for example "near_ood/OOD, MSP auroc/FP32".
    """
    of, found = grid(rows), dict[str, float]()
    for name in of.roles:
        for spec in specs(of, name):
            for column in of.columns:
                row = of.row(column, name, spec.score)
                for metric in spec.metrics if row else ():
                    if row and metric in row["metrics"]:
                        line = spec.label if len(spec.metrics) == 1 else f"{spec.label} {metric}"
                        value = measure(metric).factor * row["metrics"][metric]
                        found[f"{name}/{line}/{TITLES[column.stage]}"] = value
    return found
