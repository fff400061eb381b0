"""What a run leaves on the terminal and beside its rows: the table, the pictures, the paths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qatlab.curves import draw_curves
from qatlab.evaluation import Row
from qatlab.loggers import Wandb, merge_curves
from qatlab.pictures import draw_calibration
from qatlab.table import results_table
from qatlab.table_files import export

if TYPE_CHECKING:
    from qatlab.study import Study


def conclude(studies: Sequence[Study]) -> None:
    """Print the table of the stored rows of some runs on one suite, and what was written; on rank zero."""
    first = studies[0]
    if not first.trainer.is_global_zero:
        return
    terminal = Console().is_terminal
    console = Console(width=None if terminal else 160, soft_wrap=not terminal)
    for study in studies:
        if not study.computed:
            console.print(f"{study.run.folder} was finished before: its stored results (force=true computes them anew)")
    rows = [row for study in studies for row in asked(study)]
    title = " | ".join(f"{study.recipe} {study.run.id}" for study in studies)
    console.print(results_table(rows, title))
    for study in studies:
        if study.skipped:
            console.print(f"{study.skipped}")
    if any(study.took.encoded for study in studies):
        console.print(_counted(studies), highlight=False)
    for name, why in first.suite.skipped.items():
        console.print(f"left out: {name}: {why}", highlight=False, soft_wrap=True)
    for line in first.needs.lacking:
        console.print(line, highlight=False, soft_wrap=True)
    for study in studies:
        for name, path in _written(study, rows if study is first else ()).items():
            if path and Path(path).exists():
                console.print(f"{name:22} {path}", highlight=False)
    unsent = [folder for logger in first.trainer.loggers if isinstance(logger, Wandb) if (folder := logger.finish())]
    for folder in [*sorted((first.run.folder / "wandb").glob("offline-run-*")), *unsent]:
        title = "W&B (not uploaded)" if folder in unsent else "W&B (offline)"
        console.print(f"{title:22} {folder}   (upload: wandb sync {folder})", highlight=False)


def asked(study: Study) -> list[Row]:
    """Return the rows of the suite that was asked for; those of other images under the same names may lie beside them."""
    sets = {(entry.source.name, entry.source.definition) for entry in study.suite.sets}
    return [row for row in study.run.rows() if (row["dataset"], row["definition"].partition("+")[0]) in sets]


def _counted(studies: Sequence[Study]) -> str:
    """Return what the passes took: "images decoded 96, embedded 192 (96, 96 by encoder); text tower calls 1"."""
    encoded: Counter[str] = Counter()
    for study in studies:
        encoded.update(study.took.encoded)
    texts = sum(
        clip.text_calls for study in studies for clip in {id(c): c for c in (study.clip, study.scored_clip)}.values()
    )
    each = ", ".join(map(str, encoded.values()))
    decoded = sum(study.took.decoded for study in studies)
    return f"images decoded {decoded}, embedded {encoded.total()} ({each} by encoder); text tower calls {texts}"


def _written(study: Study, rows: Sequence[Row]) -> dict[str, Any]:
    run = study.run
    curves = merge_curves(run.folder)
    reference = next(entry.source for entry in study.suite.sets if entry.source.role == "id")
    drawn = draw_calibration(run.folder, reference)
    form = study.config.format
    return {
        "rows": run.results,
        "table": export(rows, form, run.folder) if form and rows else None,
        "per-image predictions": run.folder / "predictions",
        "layers": run.folder / "layers.csv",
        "curves": curves,
        "model": next(
            (p for p in (run.folder / "model.safetensors", run.folder / "quantized.safetensors") if p.exists()), None
        ),
        **drawn,
        "curves drawn": curves and draw_curves(curves, run.folder / "curves.png"),
    }
