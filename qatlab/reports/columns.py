"""The grid of a table: which column and which set a row belongs to.

Runs of one model share the column of its FP32. Two rows are of one set where the set has the same name and the same
images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from qatlab.reports.titles import bits
from qatlab.results.latest import definition_of
from qatlab.results.rowfile import Row
from qatlab.results.stages import FP32, TITLES

# Rows with the same values of these entries are about the same unquantized model, even if they belong to different
# runs.
_OF_MODEL = ("model", "pretrained", "weights", "activation", "fp32_id")
Model = tuple[Any, ...]


class Column(NamedTuple):
    """What a column of a table shows: a model, a run of this model (None for full precision) and a stage."""

    model: Model
    run_id: Any
    stage: str


class Named(NamedTuple):
    """The parts of a column's title: the model, its bits ("" for full precision) and the stage.

    Where the table shows several runs, the name of the run stands in front of the stage.
    """

    model: str
    bits: str
    stage: str

    @property
    def title(self) -> str:
        """Return the title of the column: model and bits on the first line, run and stage below them."""
        return "\n".join(filter(None, [" ".join(filter(None, [self.model, self.bits])), self.stage]))


@dataclass
class Grid:
    """The rows that a table shows, found by column, set and score.

    ``columns`` {column: its title} and ``roles`` {name of a set: its role} are in the order of the table. A set that
    was scored on several selections of its images has a name for each selection.
    """

    columns: dict[Column, Named] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    datasets: dict[str, str] = field(default_factory=dict)  # {name of a set in the table: its name in the suite}
    rows: dict[tuple[Column, str, str], Row] = field(default_factory=dict)  # by column, name of a set and score

    def row(self, column: Column, name: str, score: str) -> Row | None:
        """Return the row of a score of a set in a column, None without one."""
        return self.rows.get((column, name, score))

    def fp32(self, column: Column) -> Column | None:
        """Return the column of the same model in full precision; None where ``column`` is in full precision itself."""
        return None if column.stage == FP32 else Column(column.model, None, FP32)

    def scores(self, name: str) -> list[str]:
        """Return the names of the scores that at least one column has for a set, each once."""
        return list(dict.fromkeys(score for _, of, score in self.rows if of == name))


def grid(rows: Sequence[Row]) -> Grid:
    """Return the rows of finished evaluations in a grid; probes and fits of the temperature are left out."""
    # Probes have a stage without a title; calibration sets are not scored.
    final = [row for row in rows if row["stage"] in TITLES and row["role"] != "calibration"]
    models = _models(final)
    sets = _sets(final, models)
    found = Grid(_columns(final, models))
    for row in final:
        name = sets[_scored_set(row, models)]
        found.rows[_column(row, models), name, row["score"]] = row
        found.roles[name], found.datasets[name] = row["role"], row["dataset"]
    return found


def _models(rows: Sequence[Row]) -> dict[Any, Model]:
    """Return {run id: unquantized model}; a model is the tuple of all entries of its rows that tell it from other models."""
    found: dict[Any, Model] = {}
    # Rows of earlier releases have no fp32_id. Where a run has rows with and without one, a row with an fp32_id
    # decides, because it is sorted to the end.
    for row in sorted(rows, key=lambda row: "fp32_id" in row):
        found[row.get("run_id")] = tuple(row.get(key) for key in _OF_MODEL)
    return found


def _column(row: Row, models: dict[Any, Model]) -> Column:
    """Return the column that a row belongs to; the FP32 rows of all runs of one model belong to one column."""
    run_id = row.get("run_id")
    return Column(models[run_id], None if row["stage"] == FP32 else run_id, row["stage"])


def _columns(rows: Sequence[Row], models: dict[Any, Model]) -> dict[Column, Named]:
    """Return {column: title}, model by model: FP32 is the first column of a model, and the stages of a run are neighbours."""
    names, stages = _names(list(dict.fromkeys(models[row.get("run_id")] for row in rows))), list(TITLES)
    runs = list(dict.fromkeys(row.get("run_id") for row in rows if row["stage"] != FP32))
    found: dict[Column, Named] = {}
    for row in rows:
        column = _column(row, models)
        of_run = column.run_id is not None and max(len(runs), len(names)) > 1
        stage = f"{row['recipe']} {column.run_id}\n{TITLES[column.stage]}" if of_run else TITLES[column.stage]
        found[column] = Named(names[column.model], "" if column.stage == FP32 else bits(row), stage)

    def place(column: Column) -> tuple[int, int, int]:
        # -1 puts full precision in front of the runs of its model.
        run = -1 if column.run_id is None else runs.index(column.run_id)
        return list(names).index(column.model), run, stages.index(column.stage)

    return {column: found[column] for column in sorted(found, key=place)}


def _names(models: Sequence[Model]) -> dict[Model, str]:
    """Return {model: name}: architecture and weights, or all entries of the model where two models share these."""
    short: dict[Model, str] = {}
    for model in models:
        architecture, tag, weights = model[:3]
        # A path is shortened to its file name. The tiny model has the same word as name and tag: _joined writes it
        # once.
        short[model] = _joined([architecture, tag, weights and Path(weights).name])
    shared = Counter(short.values())
    return {model: name if shared[name] == 1 else _joined(model) for model, name in short.items()}


def _joined(parts: Iterable[str | None]) -> str:
    """Return the parts joined by spaces, without empty parts and repetitions."""
    return " ".join(dict.fromkeys(part for part in parts if part))


def _scored_set(row: Row, models: dict[Any, Model]) -> tuple[Model, str, str]:
    """Return (model, name of the set, definition of the set) of a row: together they say which images were scored."""
    return models[row.get("run_id")], row["dataset"], definition_of(row)


def _sets(rows: Sequence[Row], models: dict[Any, Model]) -> dict[tuple[Model, str, str], str]:
    """Return {``_scored_set``: name in the table}; different images under the same name of a set get different names.

    The definitions alone cannot decide whether two models saw the same images, because a definition also depends on how
    the images are prepared for a model. Therefore the name and the number of images are compared.
    """
    images: dict[tuple[Model, str, str], int] = {}
    for row in rows:
        of = _scored_set(row, models)
        # The rows of one set may have different numbers of images: a refit counts the images that it drew, and a score
        # of two sets counts the images of the two. The largest number is taken for the set.
        images[of] = max(row["n"], images.get(of, 0))
    seen: Counter[Any] = Counter()
    lines = {}
    for (model, dataset, definition), n in images.items():
        # Where a model has several definitions with one name and one number of images, the definitions of two models
        # are matched by their order: the first of one model to the first of the other.
        lines[model, dataset, definition] = dataset, n, seen[model, dataset, n]
        seen[model, dataset, n] += 1
    several = Counter(dataset for dataset, _, _ in dict.fromkeys(lines.values()))
    return {
        key: dataset if several[dataset] == 1 else f"{dataset}, {n} images" + (f" ({key[2]})" if again else "")
        for key, (dataset, n, again) in lines.items()
    }
