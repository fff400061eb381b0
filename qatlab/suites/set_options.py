"""The roles and references of a suite's sets, read from its options and checked."""

from __future__ import annotations

from qatlab.config import EMBEDDED, SetConfig, SuiteConfig
from qatlab.core.errors import UserError, nearest

# Roles whose images show classes of their reference; the others are out of distribution.
LABELLED = ("id", "shifted", "common", "counter", "calibration")
# The two sides of a spurious cue: images of a class in front of its usual background, and in front of an unusual one.
SPURIOUS = ("common", "counter")


def is_rendered(entry: SetConfig) -> bool:
    """Return whether a set is rendered by code instead of read from disk."""
    # A list of paths always means files, because a rendered set needs no second path to be looked for.
    return isinstance(entry.path, str) and entry.path.startswith(EMBEDDED)


def for_tiny(model: str) -> str:
    """Return the sentence of the error for a rendered set with another model than tiny."""
    return (
        f"suite=embedded is a small world drawn in 64 pixels for model=tiny, and model.name={model} cannot be scored on it: name a "
        "suite of docs/DATASETS.md, such as suite=paper suite.root=FOLDER, or class folders of your own, suite=folders "
        'suite.root=FOLDER "+suite.sets.mine={path: SUBFOLDER, role: id}".'
    )


def refuse_empty(config: SuiteConfig) -> None:
    """Raise UserError for a suite without any set, without an id set, or with an unknown reference."""
    if not config.sets:
        raise UserError(
            'suite.sets is empty: give it sets, as in "+suite.sets.products={path: products, role: id}", or a file of them '
            "(docs/DATASETS.md)."
        )
    for name in config.sets:
        reference_of(name, config)  # called for the errors that it raises


def reference_of(name: str, config: SuiteConfig) -> str:
    """Return the ID set that a set is measured against; raises UserError for an unknown reference."""
    entry = config.sets[name]
    default = next((other for other, candidate in config.sets.items() if candidate.role == "id"), None)
    if default is None:
        raise UserError(
            f"no set of the suite has role: id (found {', '.join(f'{n}: {s.role}' for n, s in config.sets.items())})."
        )
    # An id set is always measured against itself, whatever its option ``reference`` says.
    reference = name if entry.role == "id" else entry.reference or default
    known = [other for other, candidate in config.sets.items() if candidate.role == "id"]
    if reference not in known:
        raise UserError(
            f"suite.sets.{name}.reference={reference} is no id set of the suite{nearest(reference, known)}; there are "
            f"{', '.join(known)}."
        )
    return reference
