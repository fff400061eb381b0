"""Image sets that are folders of files: ``<class>/<file>`` trees, and flat folders for sets without labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qatlab.core.errors import UserError, nearest
from qatlab.core.files import user_path
from qatlab.data.images.classfiles import file_rows
from qatlab.data.images.classlists import named_classes
from qatlab.data.images.imageset import Files
from qatlab.data.images.labels import text_rows
from qatlab.data.images.numbers import Counting
from qatlab.data.images.walk import images_below, subfolders


class Folders(Files):
    """The images below a folder, sorted folder by folder; the first folder is the class, the second the group.

    ``files`` are their paths below ``path``. Where all images are in a folder ``images``, ``path`` is this folder.
    Raises UserError for a missing folder, for a folder without images, and for one that cannot be listed.
    """

    kind = "folders"

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        # The type is declared here, because the tuple assignment below takes no annotation.
        self.files: list[Path]
        self.files, self.left_out = images_below(self.path)
        # Some sets, DTD among them, put all class folders into one folder "images". That folder is no class.
        if all(len(file.parts) > 1 and file.parts[0] == "images" for file in self.files):
            self.path /= "images"
            self.files = [Path(*file.parts[1:]) for file in self.files]
        self.keys = [file.parts[0] if len(file.parts) > 1 else None for file in self.files]
        self.groups = [file.parts[1] if len(file.parts) > 2 else "" for file in self.files]
        # Labelled sets refuse a class folder without images, because it is a sign of an incomplete download.
        full = {*self.keys}
        self.empty = [folder for folder in subfolders(self.path) if folder not in full]


def class_index_for(
    path: str | Path, class_names: Sequence[str], classes_file: str | Path | None = None, exclude: Sequence[str] = ()
) -> dict[str, int]:
    """Return {class folder: row of the text features} for the folders under ``path``.

    With a ``classes_file`` folders are matched to ``class_names`` by this file: .json with a list of {index, wnid,
    name} or a dict from folder to row or name, .csv with such columns, or .txt with a folder per line, whose row is the
    line. Without it folders are matched by equal names, where case, spaces, underscores and hyphens do not count.
    Folders that are as many WordNet ids as there are names are matched in sorted order, and folders that are all
    numbers from 0 on by number. ``exclude`` names folders to leave out. Raises UserError for a folder without a row,
    and where a name and a number disagree.
    """
    root = user_path(path)
    # Excluded folders need no row, so they are left out before any matching.
    folders = [folder for folder in _class_folders(root) if folder not in set(exclude)]
    if classes_file is None:
        return text_rows(folders, Counting(named_classes(class_names), str(root)))
    rows = file_rows(user_path(classes_file), class_names)
    if lost := [folder for folder in folders if folder not in rows]:
        shown = ", ".join(f"'{folder}'{nearest(folder, rows)}" for folder in lost[:3])
        raise UserError(
            f"{len(lost)} of {len(folders)} class folders under {root} have no counterpart in {classes_file}: {shown}; "
            "rename or exclude them, or give a classes file that maps folders to names."
        )
    return {folder: rows[folder] for folder in folders}


def _class_folders(root: Path) -> list[str]:
    if not root.is_dir():
        raise UserError(f"The image folder {root} does not exist; check the suite's root and the set's path.")
    folders = subfolders(root)
    if not folders:
        raise UserError(f"{root} holds no class folders; a labelled set lies on disk as <class>/<file>.")
    return folders
