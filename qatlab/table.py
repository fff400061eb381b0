"""The closing table: sets and metrics down, stages across, FP32 first, differences from it with their significance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from qatlab.evaluation import Row
from qatlab.metrics.paired import holm

LEVEL = 0.05
CAPTION = (
    "All in %, NLL in nats; (difference from FP32 on the same images). OOD scores: AUROC | FPR@95 ID+ (OOD images accepted "
    "when 95 % of ID is) | FPR@95 OOD+ (ID images rejected when 95 % of OOD is). * differs from FP32, p < 0.05 after Holm's "
    "correction over the sets."
)
TITLES = {
    "fp32": "FP32",
    "quantized": "quantized",
    "adapted": "adapted",
    "trained": "trained",
    "integer_onnx": "integer (ONNX)",
    "integer_openvino": "integer (OpenVINO)",
    "integer_torch": "integer (torch)",
    "temperature": "after temperature",
    "temperature_proxy": "after temperature (proxy)",
}
SCORES = {
    "msp": "MSP",
    "energy": "Energy",
    "max_logit": "MaxLogit",
    "mcm": "MCM",
    "entropy": "Entropy",
    "gl_mcm": "GL-MCM",
    "neglabel": "NegLabel",
    "generic_negative": "generic negatives",
    "mahalanobis": "Mahalanobis",
    "knn": "kNN",
    "vim": "ViM",
}
# The lines of a set by its role: (score, metrics side by side, label, unit factor, digits)
_Spec = tuple[str, tuple[str, ...], str, float, int]
_ZERO_SHOT: list[_Spec] = [("zero_shot", ("top1",), "top-1 %", 100, 1), ("zero_shot", ("ece",), "ECE %", 100, 1)]
_DETECTION: list[_Spec] = [
    (score, ("auroc", "fpr95_id_pos", "fpr95_ood_pos"), f"OOD, {name}", 100, 1) for score, name in SCORES.items()
]
_LINES: dict[str, list[_Spec]] = {
    "id": [
        *_ZERO_SHOT,
        ("zero_shot", ("nll",), "NLL", 1, 3),
        ("zero_shot", ("confidence_gap",), "confidence - accuracy %", 100, 1),
        ("refit_temperature", ("ece",), "ECE %, temperature cross-fitted", 100, 1),
        ("refit_vector", ("ece",), "ECE %, vector scaling cross-fitted", 100, 1),
        ("refit_isotonic", ("ece",), "ECE %, isotonic cross-fitted", 100, 1),
    ],
    "shifted": [*_ZERO_SHOT, ("msp", ("auroc",), "AUROC as OOD, MSP", 100, 1)],
    "common": [*_ZERO_SHOT],
    "counter": [
        *_ZERO_SHOT,
        ("one_vs_all", ("drop", "rsg"), "drop | RSG %", 100, 1),
        ("one_vs_20", ("drop", "rsg"), "1 vs 20: drop | RSG %", 100, 1),
        ("one_vs_all", ("vulnerability",), "added vulnerability %", 100, 1),
    ],
    "near_ood": _DETECTION,
    "far_ood": _DETECTION,
}
_LOWER_IS_BETTER = ("ece", "nll", "fpr95_id_pos", "fpr95_ood_pos", "drop", "rsg", "vulnerability")


@dataclass(frozen=True)
class Cell:
    """A cell's ``text``, and whether it is better (+1) or worse (-1) than FP32 beyond chance, else 0."""

    text: str = ""
    verdict: int = 0


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    dataset: str
    label: str
    cells: list[Cell]


def results_table(rows: Sequence[Row], title: str) -> Table:
    """Return the table of stored rows for the terminal; probes are left out. Rows of several runs stand side by side."""
    table = Table(title=title, title_justify="left", title_style="bold", caption=CAPTION, caption_justify="left")
    columns, lines = table_lines(rows)
    for name in ("set", "metric"):
        table.add_column(name)
    for name in columns:
        table.add_column(name, justify="right")
    before = None
    for line in lines:
        if before not in (None, line.dataset):
            table.add_section()
        cells = [Text(cell.text, {1: "green", -1: "red", 0: ""}[cell.verdict]) for cell in line.cells]
        table.add_row(line.dataset if line.dataset != before else "", line.label, *cells)
        before = line.dataset
    return table


def table_lines(rows: Sequence[Row]) -> tuple[list[str], list[Line]]:
    """Return the titles of the columns and the lines of the table: a column for FP32 and one per other run and stage."""
    final = [row for row in rows if row["stage"] in TITLES]
    several = len({row.get("run_id") for row in final if row["stage"] != "fp32"}) > 1
    columns: dict[tuple[Any, str], str] = {}
    for row in sorted(final, key=lambda row: list(TITLES).index(row["stage"])):
        columns.setdefault(_column(row), _title(row, several))
    if several:  # all stages of a run beside each other
        runs = list(dict.fromkeys(row.get("run_id") for row in final))
        columns = dict(sorted(columns.items(), key=lambda item: -1 if item[0][0] is None else runs.index(item[0][0])))
    found = {(_column(row), row["dataset"], row["score"]): row for row in final}
    chances = adjusted(final)
    sets = dict.fromkeys((row["dataset"], row["role"]) for row in final)
    return list(columns.values()), [
        Line(dataset, label, cells)
        for dataset, role in sets
        for label, cells in _lines(
            role,
            [{s: r for (c, d, s), r in found.items() if (c, d) == (column, dataset)} for column in columns],
            chances,
        )
    ]


def adjusted(rows: Sequence[Row]) -> dict[tuple[Any, ...], float]:
    """Return the p-values of the paired tests, corrected over the sets: {(run id, stage, set, score, metric): p}. Holm 1979.

    A family is one metric of one score under one stage of a run, over all the sets of ``rows``.
    """
    families: dict[tuple[Any, ...], dict[tuple[Any, ...], float]] = {}
    for row in rows:
        for metric, difference in row.get("paired", {}).items():
            family = row.get("run_id"), row["stage"], row["score"], metric
            key = row.get("run_id"), row["stage"], row["dataset"], row["score"], metric
            families.setdefault(family, {})[key] = difference["p_value"]
    return {
        key: float(p)
        for family in families.values()
        for key, p in zip(family, holm(list(family.values())), strict=True)
    }


def _column(row: Row) -> tuple[Any, str]:
    """FP32 is the same in every run."""
    return (None if row["stage"] == "fp32" else row.get("run_id")), row["stage"]


def _title(row: Row, several: bool) -> str:
    title = TITLES[row["stage"]]
    return f"{row['recipe']} {row['run_id']}\n{title}" if several and row["stage"] != "fp32" else title


def _lines(
    role: str, columns: list[dict[str, Row]], chances: dict[tuple[Any, ...], float]
) -> Iterator[tuple[str, list[Cell]]]:
    """Yield (label, a cell per column) of one set; ``columns`` hold a column's rows by score."""
    for score, metrics, label, factor, digits in _LINES.get(role, []):
        rows = [column.get(score) for column in columns]
        if any(row is not None and metrics[0] in row["metrics"] for row in rows):
            yield label, [_cell(row, metrics, factor, digits, chances) for row in rows]


def _cell(
    row: Row | None, metrics: Sequence[str], factor: float, digits: int, chances: dict[tuple[Any, ...], float]
) -> Cell:
    if row is None or metrics[0] not in row["metrics"]:
        return Cell()
    parts, verdicts = [], set()
    for metric in metrics:
        text, difference = f"{factor * row['metrics'][metric]:.{digits}f}", row.get("paired", {}).get(metric)
        mark = ""
        if difference is not None:
            if len(metrics) == 1:
                text += f" ({factor * difference['value']:+.{digits}f})"
            if chances[row.get("run_id"), row["stage"], row["dataset"], row["score"], metric] < LEVEL:
                mark = "*"
                verdicts.add(1 if (difference["value"] < 0) == (metric in _LOWER_IS_BETTER) else -1)
        parts.append(f"{text}{mark:1}".rjust(7 if len(metrics) > 1 else 0))
    return Cell("|".join(parts), verdicts.pop() if len(verdicts) == 1 else 0)
