"""The closing table of a run: one column per stage, FP32 first."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from qatlab.evaluation import Row

CAPTION = "All in %, NLL in nats. FPR@95 ID+: OOD images accepted when 95 % of ID is; OOD+: ID images rejected when 95 % of OOD is."
TITLES = {
    "fp32": "FP32",
    "quantized": "quantized",
    "adapted": "adapted",
    "trained": "trained",
    "temperature": "after temperature",
    "temperature_proxy": "after temperature (proxy)",
}
# The lines of a labelled set: (metric, label, unit factor, digits)
_LABELLED = {
    "id": [
        ("top1", "top-1 %", 100, 1),
        ("ece", "ECE %", 100, 1),
        ("nll", "NLL", 1, 3),
        ("confidence_gap", "confidence - accuracy %", 100, 1),
    ],
    "shifted": [("top1", "top-1 %", 100, 1), ("ece", "ECE %", 100, 1)],
}


SCORES = {"msp": "MSP", "energy": "Energy", "max_logit": "MaxLogit", "mcm": "MCM"}
_DETECTION = ("auroc", "fpr95_id_pos", "fpr95_ood_pos")


def results_table(rows: list[Row], title: str) -> Table:
    """Return the table of a run's stored rows: sets and metrics down, stages across; probes are left out."""
    final = {(r["stage"], r["dataset"], r["score"]): r for r in rows if r["stage"] in TITLES}
    stages = [stage for stage in TITLES if any(key[0] == stage for key in final)]
    table = Table(title=title, title_justify="left", title_style="bold", caption=CAPTION, caption_justify="left")
    table.add_column("set")
    table.add_column("metric")
    for stage in stages:
        table.add_column(TITLES[stage], justify="right")
    for dataset, role in dict.fromkeys((r["dataset"], r["role"]) for r in final.values()):
        by_stage = [
            {score: row for (s, d, score), row in final.items() if (s, d) == (stage, dataset)} for stage in stages
        ]
        for i, (label, cells) in enumerate(_lines(role, by_stage)):
            table.add_row(dataset if i == 0 else "", label, *cells)
        table.add_section()
    return table


def _lines(role: str, stages: list[dict[str, Row]]) -> Iterator[tuple[str, list[str]]]:
    """Yield (label, a cell per stage) of one set; ``stages`` hold a stage's rows by score."""
    for metric, label, factor, digits in _LABELLED.get(role, []):
        rows = [stage.get("zero_shot") for stage in stages]
        yield label, [f"{factor * row['metrics'][metric]:.{digits}f}" if row else "" for row in rows]
    for score, name in SCORES.items() if role.endswith("ood") else []:
        rows = [stage.get(score) for stage in stages]
        if any(rows):
            cells = [" | ".join(f"{100 * row['metrics'][m]:5.1f}" for m in _DETECTION) if row else "" for row in rows]
            yield f"{name}: AUROC | FPR@95 ID+ | OOD+", cells
