"""What of a suite is there, what is missing and where it was looked for, before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from qatlab.config import Config, SuiteConfig
from qatlab.data.classlists import ClassList
from qatlab.data.entries import LABELLED, is_rendered, reference_of, refuse_empty
from qatlab.data.opening import OpenedSet, SetFiles
from qatlab.data.sets import ImageSet
from qatlab.data.texttable import load_text_table
from qatlab.data.transforms import Preprocess
from qatlab.errors import UserError

# Nothing is decoded here, so the size of the images does not matter.
_UNUSED = Preprocess(224, (0.0,) * 3, (1.0,) * 3)  # type: ignore[arg-type]


@dataclass(frozen=True)
class SuiteCheck:
    """``text`` to print, and whether the suite is ``complete``: every set there and readable."""

    text: str
    complete: bool


def check(config: Config) -> None:
    """Print what of the suite of ``config`` is there; ends the process with 2 where not all of it is."""
    spec = config.model.text_features
    found = check_suite(config.suite, load_text_table(spec).names if spec else None)
    print(found.text)
    if not found.complete:
        sys.exit(2)


def check_suite(config: SuiteConfig, table: Sequence[str] | None = None) -> SuiteCheck:
    """Return which sets were found where, with their layout, images, published number of images and class list.

    ``table`` are the class names of model.text_features, where that stands in for the text tower. Images are counted,
    not decoded. Raises UserError for a suite that no data could mend: empty, with an unknown role or reference.
    """
    refuse_empty(config)
    files = SetFiles(config)
    missing = files.missing()
    found, broken = [], {}
    for name in config.sets:
        if name in missing:
            continue
        try:
            found.append(_found(name, config, files, table))
        except UserError as error:
            broken[name] = str(error)
    lines = [f"{len(found)} of {len(config.sets)} sets are there (suite.root={config.root}):"]
    widths = [max(map(len, column)) for column in zip(*found, strict=True)]
    lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in found]
    for title, sets in (("missing", missing), ("there, but not as expected", broken)):
        if sets:
            lines += [f"{len(sets)} {title}:", *(f"  {name}: {why}" for name, why in sets.items())]
    return SuiteCheck("\n".join(lines), not missing and not broken)


def _found(name: str, config: SuiteConfig, files: SetFiles, table: Sequence[str] | None) -> tuple[str, ...]:
    """A set's line: name, role, layout, images, classes, place."""
    entry = config.sets[name]
    opened = files.open(name, files.head(reference_of(name, config), table), _UNUSED)
    kind = "rendered" if is_rendered(entry) else files.layout(name).kind
    images, classes = _images(opened, entry.images), _classes(opened, entry.role)
    return name, entry.role, kind, images, classes, str(files.place(name) or "")


def _images(opened: OpenedSet, published: int | None) -> str:
    images = opened.images
    total = images.total if isinstance(images, ImageSet) else len(images)
    used = f", {len(images)} picked" if len(images) < total else ""
    said = "" if published is None else " as published" if total == published else f" (published: {published})"
    return f"{total} images{said}{used}"


def _classes(opened: OpenedSet, role: str) -> str:
    classes = opened.classes
    if classes is None:
        return "no classes"
    if role not in LABELLED or not isinstance(opened.images, ImageSet):
        return _named(classes)
    return f"{len(set(opened.images.labels))} of {len(classes)} classes of {_named(classes)}"


def _named(classes: ClassList) -> str:
    part = "" if classes.of is None else f" ({len(classes)} of {classes.of.name}'s {len(classes.of)})"
    return f"{classes.name}{part}"
