"""What a suite's options say of its sets: their roles, references and class names."""

from __future__ import annotations

import json
from pathlib import Path

from qatlab.config import SetConfig, SuiteConfig
from qatlab.errors import UserError, nearest

EMBEDDED = "embedded:"
ROLES = ("id", "shifted", "near_ood", "far_ood", "common", "counter", "calibration")
LABELLED = ("id", "shifted", "common", "counter", "calibration")
SPURIOUS = ("common", "counter")


def is_rendered(entry: SetConfig) -> bool:
    """Return whether a set is made on the spot, not read."""
    return isinstance(entry.path, str) and entry.path.startswith(EMBEDDED)


def refuse_empty(config: SuiteConfig) -> None:
    """Raise UserError for a suite without a set, without an id set, or with an unknown role or reference."""
    if not config.sets:
        raise UserError(
            "suite.sets is empty: suite=folders needs sets, each with a path, a role and a reference (README shows one)."
        )
    for name in config.sets:
        reference_of(name, config)


def reference_of(name: str, config: SuiteConfig) -> str:
    """Return the ID set that a set is measured against; raises UserError for an unknown role or reference."""
    entry = config.sets[name]
    if entry.role not in ROLES:
        raise UserError(
            f"suite.sets.{name}.role={entry.role} is unknown{nearest(entry.role, ROLES)}; there are {', '.join(ROLES)}."
        )
    default = next((other for other, candidate in config.sets.items() if candidate.role == "id"), None)
    if default is None:
        raise UserError(
            f"no set of the suite has role: id (found {', '.join(f'{n}: {s.role}' for n, s in config.sets.items())})."
        )
    reference = name if entry.role == "id" else entry.reference or default
    if reference not in config.sets or config.sets[reference].role != "id":
        raise UserError(
            f"suite.sets.{name}.reference={reference} is no id set of the suite{nearest(reference, config.sets)}."
        )
    return reference


def suite_class_names(config: SuiteConfig) -> list[str] | None:
    """Return suite.class_names, read from its file where it is one; raises UserError when that is missing or holds none."""
    if not isinstance(config.class_names, str):
        return config.class_names
    path = Path(config.root or ".").expanduser() / config.class_names
    if not path.is_file():
        raise UserError(
            f"suite.class_names={config.class_names}: there is no file {path}; give a .txt, a .json or a list."
        )
    if path.suffix == ".txt":
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    records = json.loads(path.read_text())
    if isinstance(records, list) and all(
        isinstance(record, dict) and {"index", "name"} <= set(record) for record in records
    ):
        return [record["name"] for record in sorted(records, key=lambda record: record["index"])]
    if isinstance(records, list) and all(isinstance(record, str) for record in records):
        return records
    raise UserError(f"{path} is no list of names, nor of records with index and name.")
