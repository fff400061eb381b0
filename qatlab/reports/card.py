"""The model card of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from qatlab.deploy.agreement import EndToEnd, agreement
from qatlab.quant.inspect.coverage import statement
from qatlab.quant.inspect.kept import told
from qatlab.reports.markdown import literal
from qatlab.reports.titles import SCORES
from qatlab.results.contexts import SHARED
from qatlab.results.rowfile import Row
from qatlab.results.stages import FP32, TITLES

_MCM = SCORES["mcm"]
# What the card shows of a set, {(score, metric): (title, unit factor, digits)}, where the set has that metric.
_SHOWN = {
    ("zero_shot", "top1"): ("top-1 %", 100, 1),
    ("zero_shot", "ece"): ("ECE %", 100, 1),
    ("zero_shot", "nll"): ("NLL", 1, 3),
    ("mcm", "auroc"): (f"AUROC %, {_MCM}", 100, 1),
    ("mcm", "fpr95_id_pos"): (f"FPR@95 ID+ %, {_MCM}", 100, 1),
    ("mcm", "fpr95_ood_pos"): (f"FPR@95 OOD+ %, {_MCM}", 100, 1),
}
# The entries that are the same in all rows of a run: card.json has them once, outside of its rows.
_OF_RUN = {"run_id", "data", *SHARED} - {"fp32_id"}
_REQUIREMENT = {
    True: "Its products are exact on every CPU.",
    False: "It needs a CPU that adds products of bytes in 32 bits, on x86 one with VNNI (avx512_vnni or avx_vnni);\n"
    "  check.npz tells one that does not, and `qatlab.deploy.load` refuses it.",
}
_LICENCES = {
    "openai": "MIT (github.com/openai/CLIP)",
    "laion400m_e32": "MIT (github.com/mlfoundations/open_clip)",
    "tiny": "Apache-2.0 (part of qatlab)",
}


def write_card(
    folder: Path, about: dict[str, Any], rows: Sequence[Row], run: Path, simulated: str, integer: str
) -> None:
    """Write README.md and card.json to ``folder``: what the model is, what was measured of it, and how to use it.

    ``about`` is the content of export.json. ``rows`` are the rows of the run in the folder ``run``, of three stages:
    fp32, the stage named by ``simulated``, and the stage named by ``integer``. The last two were scored at the logit
    scale that the export is served with.
    """
    last = rows[-1]  # a row of this export: its versions are the versions that wrote the files
    licence = _LICENCES.get(str(about["pretrained"]), "that of the weights it was made of")
    # README.md is written from this dictionary, so that every number in it is in card.json too.
    card: dict[str, Any] = {
        **about,
        "command": f"python -m qatlab.export checkpoint={run} format={about['format']}"
        + (" exact=true" if last["config"].get("exact") else "")
        + (f" {asked}" if (asked := about["in_distribution"]["asked"]) else ""),
        "licence": licence,
        "versions": last["versions"],
        "commit": last["commit"],
        "config": last["config"],
        "rows": [_without_run(row) for row in rows],
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1))
    columns = {FP32: TITLES[FP32], simulated: "simulated", integer: TITLES[integer]}
    (folder / "README.md").write_text(_markdown(card, columns))


def _without_run(row: Row) -> Row:
    """Return a row without the entries that are the same in all rows of its run."""
    return {key: value for key, value in row.items() if key not in _OF_RUN}


def _lines(rows: Sequence[Row], stages: Sequence[str]) -> list[list[str]]:
    """Return the lines of the card's table: the set, the title of a metric, and a cell for each stage.

    A set has a line for each metric of _SHOWN that its FP32 row has.
    """
    found = {(row["dataset"], row["score"], row["stage"]): row for row in rows}
    lines = []
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        for (score, metric), (title, factor, digits) in _SHOWN.items():
            if metric in found.get((dataset, score, FP32), {}).get("metrics", {}):
                of_stages = [found.get((dataset, score, stage)) for stage in stages]
                cells = [_cell(row, metric, factor, digits) for row in of_stages]
                lines.append([literal(dataset), title, *cells])
    return lines


def _kept(channels: dict[str, int]) -> str:
    """Return the line on what is multiplied in floats, from the number of ``channels`` by layer; "" where nothing is."""
    if not channels:
        return ""
    return f"\n* {told(channels)}, a product in floats beside the integer one."


def _markdown(card: dict[str, Any], columns: dict[str, str]) -> str:
    """Return the text of README.md; ``columns`` {stage: title} are the columns of its table."""
    lines = _lines(card["rows"], list(columns))
    # disable_numparse: tabulate would write "0.30" as 0.3.
    table = tabulate(lines, ["set", "metric", *columns.values()], tablefmt="github", disable_numparse=True)
    whole, size = card["end_to_end"], card["preprocess"]["size"]
    versions = ", ".join(f"{name} {version}" for name, version in card["versions"].items())
    # dict.fromkeys: where the model and its weights have the same name, the name is written once.
    name = literal(" ".join(dict.fromkeys(filter(None, [card["model"], card["pretrained"]]))))
    brackets = "In brackets 95 % bootstrap intervals; " if any(row["intervals"] for row in card["rows"]) else ""
    alike = literal(agreement({name: EndToEnd(**of) for name, of in card["sets"].items()}))
    return f"""# {name}, quantized: {card["method"]}

An image encoder whose {card["integer_layers"]} quantized layers multiply {card["weight_bits"]:.4g}-bit weights and
{card["act_bits"]:.4g}-bit inputs in integers, for {card["runtime"]} (`{card["file"]}`):
normalised images (B, 3, {size}, {size}) float32 in, features (B, D) float32 out.

{table}

{brackets}NLL in nats. FPR@95 ID+: out-of-distribution images accepted where 95 % of the
in-distribution ones are; OOD+: in-distribution images rejected where 95 % of the others are.
FP32 is read at its own logit scale, the other columns at the one below, which is served.

* {statement(card)}.{_kept(card.get("outlier_channels", {}))}
* Features of {literal(whole["of"])} ({whole["n"]} images): {whole["integer"]:.1e} from the simulation's, which are
  {whole["simulated"]:.1e} from full precision. parity.csv has every layer.
* Top-1 answers that are the simulation's: {alike}.
* Probabilities: {_probabilities(card)},
  {literal(card["logit_scale_of"])}; classes.npz has the class embeddings.
* In-distribution: {_accepted(card["in_distribution"])}
* Certified on {literal(card["cpu"])}. {_REQUIREMENT[card["exact"]]}
* Calibration and training data: {literal(card["data"])}. Licence of the weights: {card["licence"]}.
* Made by `{card["command"]}` of recipe {literal(card["recipe"])} with {card["runtime"]},
  {versions}, qatlab at commit {card["commit"]}.
  card.json has every option of the run and every number; export.json checksums, and how images are prepared.
"""


def _probabilities(card: dict[str, Any]) -> str:
    """Return in words how probabilities are computed from the cosines."""
    scale = card["logit_scale"]
    if card.get("zeroshot") == "sigmoid":
        return f"of each class by itself, sigmoid of {scale:.4g} times its cosine plus {card['logit_bias']:.4g}"
    return f"softmax of {scale:.4g} times the cosines (temperature {1 / scale:.4g})"


def _accepted(inside: dict[str, Any]) -> str:
    """Return in words which images count as in-distribution, and how many of each OOD set do."""
    score = SCORES[inside["score"]]
    if inside["score"] == "mcm":  # no other score has a temperature of its own
        score += f" (temperature {inside['temperature']:g})"
    reached = f"{score} of at least {inside['threshold']:.6g},\n  which {100 * inside['reached']:.4g} % of the"
    of = [
        f"{100 * found['share']:.1f} % of {literal(name)} ({found['images']} images)"
        for name, found in inside["accepted"].items()
    ]
    outside = f"It accepts {', '.join(of)}" if of else "No OOD set was scored with it"
    return f"{reached} {inside['images']} images of {literal(inside['of'])} reach. {outside}."


def _cell(row: Row | None, metric: str, factor: float, digits: int) -> str:
    """Return a metric in its unit with its interval in brackets; "" where the row or the metric is missing."""
    if row is None or metric not in row["metrics"]:
        return ""
    low, high = row["intervals"].get(metric, (None, None))
    between = f" ({factor * low:.{digits}f} to {factor * high:.{digits}f})" if low is not None else ""
    return f"{factor * row['metrics'][metric]:.{digits}f}{between}"
