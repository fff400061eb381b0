"""The table of post-training methods on a real CLIP, a Markdown row for each finished run below some folders.

python -m qatlab.sweep run --config-dir examples sweep=post_training output=runs model.checkpoint=... suite.root=... ...
python benchmarks/post_training.py runs

Of the ID set: top-1, the difference from FP32 with its interval and McNemar's exact p, the share of images whose answer
differs (flips), ECE and NLL. Of the first OOD set: AUROC by MCM and its difference. All are read from the rows and the
predictions of the runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import polars as pl

import qatlab

HEADER = (
    "| | top-1 % | against FP32, points [95 %] | McNemar p | flips % | ECE % | NLL | AUROC %, points [95 %] |\n"
    "|---|---|---|---|---|---|---|---|"
)
QUANTIZED, FULL = "quantized", "fp32"


def main() -> None:
    """Print the table, the most bits first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    rows = []
    for folder in parser.parse_args().folders:
        for path in sorted(folder.glob("*/finished.json")):
            rows.append(row_of(qatlab.open_run(path.parent)))
    print(HEADER)
    bits = None
    for row in sorted(rows, key=lambda row: (-row["weight_bits"], -row["act_bits"], row["method"])):
        if (row["weight_bits"], row["act_bits"]) != bits:
            bits = row["weight_bits"], row["act_bits"]
            print(f"| **W{bits[0]:g}A{bits[1]:g}** | | | | | | | |")
        print(line(row))


def row_of(run: Any) -> dict[str, Any]:
    """The numbers of one run by the names that rows have, and what only pairs of predictions tell."""
    of_stage = pl.col("stage") == QUANTIZED
    rows = run.frame().filter(of_stage)
    inside = rows.filter(pl.col("score") == "zero_shot").row(0, named=True)
    outside = rows.filter(pl.col("score") == "mcm").row(0, named=True)
    of_set = pl.col("dataset") == inside["dataset"]
    answers = [run.predictions(stage).filter(of_set)["prediction"] for stage in (FULL, QUANTIZED)]
    detection = {name: outside[name] for name in outside if name.startswith("auroc")}
    return {**inside, **detection, "flips": float((answers[0] != answers[1]).mean())}


def line(row: dict[str, Any]) -> str:
    """The Markdown row of the numbers of one run."""

    def points(name: str) -> str:
        value, low, high = (100 * row[f"{name}_difference{end}"] for end in ("", "_low", "_high"))
        return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"

    cells = [
        f"`{row['method']}`",
        f"{100 * row['top1']:.1f}",
        points("top1"),
        f"{row['top1_p']:.1g}",
        f"{100 * row['flips']:.1f}",
        f"{100 * row['ece']:.1f}",
        f"{row['nll']:.3f}",
        f"{100 * row['auroc']:.1f}, {points('auroc')}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
