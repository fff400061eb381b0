"""Class folders whose names serve as class names, and class folders that are only a part of the named classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qatlab.core.errors import UserError
from qatlab.data.images.claims import row_of
from qatlab.data.images.classlists import WNID, ClassList, named_classes
from qatlab.data.images.folders import Folders
from qatlab.data.images.imageset import Layout

FOLDERS, ALL = "folders", "all"
"""Two words that a set's option ``class_names`` takes instead of a file: its folders' names, or all names of the suite."""


def class_folders(layout: Layout, exclude: Sequence[str]) -> list[str]:
    """Return the names of the class folders of a set, sorted, without those in ``exclude``; [] for a set without folders."""
    if not isinstance(layout, Folders):
        return []
    return sorted({str(key) for key in layout.keys if key is not None} - {*exclude})


def named_by_folders(name: str, layout: Layout, exclude: Sequence[str]) -> ClassList:
    """Return the class list made of the folder names of the set ``name``, sorted, with spaces instead of underscores.

    Raises UserError for folder names that are numbers or WordNet ids, because no prompt can be made of them, and for a
    set without class folders.
    """
    folders = class_folders(layout, exclude)
    if not folders:
        raise UserError(
            f"suite.sets.{name} names no classes, and has no class folders to name them by: give suite.class_names, its class "
            "list (classes=), or model.text_features with the names beside it."
        )
    for folder in folders:
        if folder.isdecimal() or WNID.fullmatch(folder):
            what = "a number" if folder.isdecimal() else "a WordNet id"
            raise UserError(
                f"suite.sets.{name}: its folder {folder} is {what} and no name of a class: give its class list (classes=, "
                "such as imagenet1k), or suite.class_names."
            )
    named = named_classes([folder.replace("_", " ") for folder in folders])
    return replace(named, name=f"the {len(folders)} folders of {name}")


def refuse_few(name: str, folders: Sequence[str], classes: ClassList) -> None:
    """Raise UserError where an id set has folders for only some of the ``classes``, and the user has not chosen any for it.

    Zero-shot classification among 8 classes is much easier than among 1000, so the user has to say which one is meant.
    """
    # A folder that matches no class name is another error, which find_labels reports.
    matched = all(row_of(folder, classes) is not None for folder in folders)
    if folders and matched and len(folders) < len(classes):
        raise UserError(
            f"suite.sets.{name} has {len(folders)} class folders, and the suite or the text features name {len(classes)} classes: "
            f"say suite.sets.{name}.class_names={FOLDERS} to tell its images among the {len(folders)}, or "
            f"suite.sets.{name}.class_names={ALL} among all {len(classes)}."
        )
