"""What a run leaves on the terminal and beside its rows: the table, the pictures, the paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from qatlab.curves import draw_curves
from qatlab.loggers import Wandb, merge_curves
from qatlab.plots import reliability_diagram
from qatlab.table import TITLES, results_table


def conclude(study: Any) -> None:
    """Print the table of the suite's stored rows and the paths of what was written; draw the pictures, on rank zero."""
    if not study.trainer.is_global_zero:
        return
    terminal = Console().is_terminal
    run, console = study.run, Console(width=None if terminal else 160, soft_wrap=not terminal)
    if not study.computed:
        console.print(f"{run.folder} was finished before: its stored results (force=true computes them anew)")
    # Rows of other images under the same names may lie there too: what was asked for is this suite.
    asked = {(entry.source.name, entry.source.definition) for entry in study.suite.sets}
    rows = [row for row in run.rows() if (row["dataset"], row["definition"].partition("+")[0]) in asked]
    console.print(results_table(rows, f"{study.recipe} {run.id}"))
    reliability = draw_reliability(study)
    curves = merge_curves(run.folder)
    skipped = study.skipped
    if skipped:
        console.print(f"{skipped}")
    written = {
        "rows": run.results,
        "per-image predictions": run.folder / "predictions",
        "layers": run.folder / "layers.csv",
        "curves": curves,
        "model": next(
            (p for p in (run.folder / "model.safetensors", run.folder / "quantized.safetensors") if p.exists()), None
        ),
        "reliability": reliability,
        "curves drawn": curves and draw_curves(curves, run.folder / "curves.png"),
    }
    for name, path in written.items():
        if path and Path(path).exists():
            console.print(f"{name:22} {path}", highlight=False)
    unsent = [folder for logger in study.trainer.loggers if isinstance(logger, Wandb) if (folder := logger.finish())]
    for folder in [*sorted((run.folder / "wandb").glob("offline-run-*")), *unsent]:
        title = "W&B (not uploaded)" if folder in unsent else "W&B (offline)"
        console.print(f"{title:22} {folder}   (upload: wandb sync {folder})", highlight=False)


def draw_reliability(study: Any) -> Path | None:
    """Draw reliability.png of the first ID set: the stage before the refit beside the one after; returns its path."""
    reference = next(entry.source for entry in study.suite.sets if entry.source.role == "id")
    panels = []
    for stage in [s for s in TITLES if (study.run.folder / "predictions" / f"{s}.parquet").exists()]:
        frame = pl.read_parquet(study.run.folder / "predictions" / f"{stage}.parquet").filter(
            (pl.col("dataset") == reference.name) & pl.col("definition").str.starts_with(reference.definition)
        )
        if len(frame):  # a stage that was scored on another suite only has nothing to show
            confidence, correct = (frame[name].to_numpy(writable=True) for name in ("confidence", "correct"))
            panels.append((TITLES[stage], confidence, correct))
    if not panels:
        return None
    path: Path = study.run.folder / "reliability.png"
    reliability_diagram(panels, path)
    return path
