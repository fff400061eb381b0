"""suite.check: a report on which sets of a suite exist, which are missing, and where they were looked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from qatlab.config import Config, SuiteConfig
from qatlab.core.errors import UserError
from qatlab.core.limits import use_limits
from qatlab.data.images.classlists import ClassList
from qatlab.data.images.imageset import ImageSet
from qatlab.data.images.walk import told
from qatlab.data.preprocess import Preprocess
from qatlab.data.texttable import load_text_table
from qatlab.suites.set_files import OpenedSet, SetFiles
from qatlab.suites.set_options import LABELLED, is_rendered, reference_of, refuse_empty

# SetFiles.open needs a preprocessing. No image is decoded here, so this one is never used.
_UNUSED = Preprocess(224, (0.0,) * 3, (1.0,) * 3)  # type: ignore[arg-type]


@dataclass(frozen=True)
class SuiteCheck:
    """The ``text`` to print, and whether the suite is ``complete``: every set is there and readable."""

    text: str
    complete: bool


def check(config: Config) -> None:
    """Print which sets of the suite exist; ends the process with status 2 where a set is missing or unreadable."""
    # The limits are set here because no experiment is opened, which would set them.
    use_limits(**asdict(config.limits))
    spec = config.model.text_features
    found = check_suite(config.suite, load_text_table(spec).names if spec else None)
    print(found.text)
    if not found.complete:
        sys.exit(2)


def check_suite(config: SuiteConfig, table: Sequence[str] | None = None) -> SuiteCheck:
    """Return a text with a line per set: its place, layout, number of images, published number and class list.

    Images are counted, not decoded. Files in a set's folder that are no image of the set are counted by reason.
    ``table`` are the class names of model.text_features, if that table replaces the text tower. Raises UserError for a
    suite that is wrong whatever is on disk: an empty one, or one with an unknown role or reference.
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
        # The error of one set does not end the check, so that one call reports everything to download or correct.
        except UserError as error:
            broken[name] = str(error)
    lines = [f"{len(found)} of {len(config.sets)} sets are there (suite.root={config.root}):"]
    widths = [max(map(len, column)) for column in zip(*found, strict=True)]
    lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in found]
    left_out = {}
    for name, *_ in found:
        if said := _left_out(name, config, files):
            left_out[name] = said
    if left_out:
        lines += ["there and no image of a set:", *(f"  {name}: {said}" for name, said in left_out.items())]
    for title, sets in (("missing", missing), ("there, but not as expected", broken)):
        if sets:
            lines += [f"{len(sets)} {title}:", *(f"  {name}: {why}" for name, why in sets.items())]
    return SuiteCheck("\n".join(lines), not missing and not broken)


def _found(name: str, config: SuiteConfig, files: SetFiles, table: Sequence[str] | None) -> tuple[str, ...]:
    """Return the columns of a set's line: name, role, layout, images, classes, path."""
    entry = config.sets[name]
    opened = files.open(name, files.head(reference_of(name, config), table), _UNUSED)
    kind = "rendered" if is_rendered(entry) else files.layout(name).kind
    images, classes = _images(opened, entry.images), _classes(opened, entry.role)
    return name, entry.role, kind, images, classes, str(files.place(name) or "")


def _left_out(name: str, config: SuiteConfig, files: SetFiles) -> str:
    """Return in words which files in a set's folder are no image of the set; "" where there are none, or no folder."""
    return "" if is_rendered(config.sets[name]) else told(files.layout(name).left_out)


def _images(opened: OpenedSet, published: int | None) -> str:
    # Only a set on disk has a number of images before its pick; a rendered set makes as many images as the options ask
    # for.
    images = opened.images
    total = images.total if isinstance(images, ImageSet) else len(images)
    used = f", {len(images)} picked" if len(images) < total else ""
    said = "" if published is None else " as published" if total == published else f" (published: {published})"
    return f"{total} images{said}{used}"


def _classes(opened: OpenedSet, role: str) -> str:
    classes = opened.classes
    if classes is None:
        return "no classes"
    # OOD images have no labels to count: their class list only says which images to keep.
    if role not in LABELLED or not isinstance(opened.images, ImageSet):
        return _named(classes)
    return f"{len(set(opened.images.labels))} of {len(classes)} classes of {_named(classes)}"


def _named(classes: ClassList) -> str:
    part = "" if classes.of is None else f" ({len(classes)} of {classes.of.name}'s {len(classes.of)})"
    return f"{classes.name}{part}"
