"""The model card of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from qatlab.evaluation import Row
from qatlab.table import SCORES, TITLES

_MCM = SCORES["mcm"]
_SHOWN = {  # (score, metric): its name, unit factor and digits
    ("zero_shot", "top1"): ("top-1 %", 100, 1),
    ("zero_shot", "ece"): ("ECE %", 100, 1),
    ("zero_shot", "nll"): ("NLL", 1, 3),
    ("mcm", "auroc"): (f"AUROC %, {_MCM}", 100, 1),
    ("mcm", "fpr95_id_pos"): (f"FPR@95 ID+ %, {_MCM}", 100, 1),
    ("mcm", "fpr95_ood_pos"): (f"FPR@95 OOD+ %, {_MCM}", 100, 1),
}
_OF_RUN = (
    "run_id",
    "recipe",
    "model",
    "pretrained",
    "weights",
    "activation",
    "data",
    "seed",
    "config",
    "versions",
    "commit",
)
_LICENCES = {
    "openai": "MIT (github.com/openai/CLIP)",
    "laion400m_e32": "MIT (github.com/mlfoundations/open_clip)",
    "tiny": "Apache-2.0 (part of qatlab)",
}


def write_card(
    folder: Path, about: dict[str, Any], rows: Sequence[Row], run: Path, simulated: str, integer: str
) -> None:
    """Write README.md and card.json: what the model is, what was measured of it, and how to use it.

    ``about`` is what export.json holds, ``rows`` are those of the stages fp32, ``simulated`` and ``integer`` of the run in
    the folder ``run``.
    """
    last = rows[-1]  # written by this export: the versions are those of now
    licence = _LICENCES.get(str(about["pretrained"]), "that of the weights it was made of")
    card: dict[str, Any] = {
        **about,
        "command": f"python -m qatlab.export checkpoint={run} format={about['format']}",
        "licence": licence,
        "versions": last["versions"],
        "commit": last["commit"],
        "config": last["config"],
        "rows": [{key: value for key, value in row.items() if key not in _OF_RUN} for row in rows],
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1))
    columns = {"fp32": TITLES["fp32"], simulated: "simulated", integer: TITLES[integer]}
    (folder / "README.md").write_text(_markdown(card, columns))


def _markdown(card: dict[str, Any], columns: dict[str, str]) -> str:
    found = {(row["dataset"], row["score"], row["stage"]): row for row in card["rows"]}
    lines = [
        [dataset, name, *(_cell(found.get((dataset, score, stage)), metric, factor, digits) for stage in columns)]
        for dataset in dict.fromkeys(row["dataset"] for row in card["rows"])
        for (score, metric), (name, factor, digits) in _SHOWN.items()
        if metric in found.get((dataset, score, "fp32"), {}).get("metrics", {})
    ]
    table = tabulate(lines, ["set", "metric", *columns.values()], tablefmt="github", disable_numparse=True)
    whole, inside, size = card["end_to_end"], card["in_distribution"], card["preprocess"]["size"]
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    name = " ".join(dict.fromkeys(filter(None, [card["model"], card["pretrained"]])))
    return f"""# {name}, quantized: {card["method"]}

An image encoder whose {card["integer_layers"]} quantized layers multiply {card["weight_bits"]}-bit weights and
{card["act_bits"]}-bit inputs in integers, for {card["runtime"]} (`{card["file"]}`):
normalised images (B, 3, {size}, {size}) float32 in, features (B, D) float32 out.

{table}

In brackets 95 % bootstrap intervals; NLL in nats. FPR@95 ID+: out-of-distribution images accepted where 95 % of the
in-distribution ones are; OOD+: in-distribution images rejected where 95 % of the others are.

* Features: {whole["integer"]:.1e} from the simulation's, which are {whole["simulated"]:.1e} from full precision;
  {100 * whole["agreement"]:.1f} % of the top-1 answers are the simulation's. parity.csv has every layer.
* Probabilities: softmax of {card["logit_scale"]:.4g} times the cosines (temperature {1 / card["logit_scale"]:.4g});
  classes.npz has the class embeddings.
* In-distribution: {_MCM} (temperature {inside["temperature"]:g}) of at least {inside["threshold"]:.6g},
  which 95 % of the {inside["images"]} images of {inside["of"]} reach.
* Calibration and training data: {card["data"]}. Licence of the weights: {card["licence"]}.
* Made by `{card["command"]}` of recipe {card["recipe"]} with {card["runtime"]},
  {versions}, qatlab at commit {card["commit"]}.
  card.json has every option of the run and every number; export.json checksums, and how images are prepared.
"""


def _cell(row: Row | None, metric: str, factor: float, digits: int) -> str:
    if row is None or metric not in row["metrics"]:
        return ""
    low, high = row["intervals"].get(metric, (None, None))
    between = f" ({factor * low:.{digits}f} to {factor * high:.{digits}f})" if low is not None else ""
    return f"{factor * row['metrics'][metric]:.{digits}f}{between}"
