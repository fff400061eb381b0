"""Labelled image sets on disk: ``<class>/<file>`` trees, and flat folders for sets without labels."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from qatlab.data.classlists import plain
from qatlab.data.sets import ImageSet, Layout, size_or_checksum
from qatlab.data.transforms import Preprocess, read_rgb
from qatlab.errors import UserError, nearest

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}
WNID = re.compile(r"n\d{8}")


class Folders(Layout):
    """The images below a folder, sorted folder by folder; the first folder is the class, the second the group.

    ``files`` are their paths below it, or below its folder ``images`` where all of them lie there. Raises UserError when
    there is no folder or no image.
    """

    kind = "folders"

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.files = _images(self.path)
        if all(len(file.parts) > 1 and file.parts[0] == "images" for file in self.files):
            self.path /= "images"
            self.files = [Path(*file.parts[1:]) for file in self.files]
        self.keys = [file.parts[0] if len(file.parts) > 1 else None for file in self.files]
        self.groups = [file.parts[1] if len(file.parts) > 2 else "" for file in self.files]
        full = {*self.keys}
        self.empty = [folder for folder in _subfolders(self.path) if folder not in full]
        self._told: dict[int, str] = {}  # several sets of a suite may be of one tree

    def name(self, place: int) -> str:
        """Return the path below the folder."""
        return self.files[place].as_posix()

    def identity(self, place: int) -> str:
        """Return the path below the folder and the size in bytes, or a checksum."""
        if place not in self._told:
            file = self.path / self.files[place]
            self._told[place] = size_or_checksum(file)
        return f"{self.name(place)}/{self._told[place]}"

    def pixels(self, place: int) -> Tensor:
        """Return the decoded file."""
        return read_rgb((self.path / self.files[place]).read_bytes())


class ImageFolderSet(ImageSet):
    """The images under ``path`` as (image (3, S, S) uint8, label), in the sorted order of class folder and file.

    With ``class_index`` {class folder: label} every image lies in a class folder, at any depth; without it the tree
    may have any shape and each label is -1. ``exclude`` names folders to leave out; ``pick`` is a Python slice in
    text ("0::2", ":500") on what remains. Raises UserError for an empty set or class folder, a
    folder or slice that does not fit, and for an image that cannot be read, with its file.
    """

    def __init__(
        self,
        path: str | Path,
        preprocess: Preprocess,
        class_index: dict[str, int] | None,
        pick: str = "0::1",
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__(Folders(path), preprocess, class_index, pick, exclude)


def class_index_for(
    path: str | Path, class_names: Sequence[str], classes_file: str | Path | None = None, exclude: Sequence[str] = ()
) -> dict[str, int]:
    """Return {class folder: row of the text features} for the folders under ``path``.

    Folders are matched to ``class_names`` by ``classes_file`` when given (.json: a list of {index, wnid, name} or a
    dict from folder to row or name; .csv with such columns; .txt with one folder per line, its row being the line);
    else by equal names, where case, spaces, underscores and hyphens do not count; else, when all are WordNet ids and as many
    as the names, in sorted order. ``exclude`` names folders to leave out. Raises UserError where a folder finds no
    row.
    """
    root = Path(path).expanduser()
    folders = [folder for folder in _class_folders(root) if folder not in set(exclude)]
    if classes_file is not None:
        rows = file_rows(Path(classes_file).expanduser(), class_names)
    else:
        rows = _rows_by_name({folder: folder for folder in folders}, class_names)
        if not rows and len(folders) == len(class_names) and all(WNID.fullmatch(folder) for folder in folders):
            rows = {folder: row for row, folder in enumerate(folders)}
    lost = [folder for folder in folders if folder not in rows]
    if lost:
        shown = ", ".join(f"'{folder}'{nearest(folder, rows if classes_file else class_names)}" for folder in lost[:3])
        source = f"{classes_file}" if classes_file else f"the {len(class_names)} class names"
        raise UserError(
            f"{len(lost)} of {len(folders)} class folders under {root} have no counterpart in {source}: {shown}; "
            "rename or exclude them, or give a classes file that maps folders to names."
        )
    return {folder: rows[folder] for folder in folders}


def _images(root: Path) -> list[Path]:
    """Image files below ``root``, relative to it, sorted folder by folder; hidden ones are left out."""
    if not root.is_dir():
        raise UserError(f"The image folder {root} does not exist; check the suite's root and the set's path.")
    found: list[Path] = []
    for folder, below, files in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        relative = Path(folder).relative_to(root)
        found += [
            relative / name for name in files if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
        ]
    if not found:
        raise UserError(f"The folder {root} holds no image ({', '.join(sorted(SUFFIXES))}); check the set's path.")
    return sorted(found, key=lambda file: file.parts)


def _subfolders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _class_folders(root: Path) -> list[str]:
    if not root.is_dir():
        raise UserError(f"The image folder {root} does not exist; check the suite's root and the set's path.")
    folders = _subfolders(root)
    if not folders:
        raise UserError(f"{root} holds no class folders; a labelled set lies on disk as <class>/<file>.")
    return folders


def _rows_by_name(named: dict[str, str], class_names: Sequence[str]) -> dict[str, int]:
    """{folder: row} for the folders whose name stands exactly once among the classes."""
    rows: dict[str, int] = {}
    repeated: set[str] = set()
    for row, name in enumerate(map(plain, class_names)):
        if name in rows:
            repeated.add(name)
        rows[name] = row
    return {folder: rows[plain(name)] for folder, name in named.items() if plain(name) in rows.keys() - repeated}


def file_rows(path: Path, class_names: Sequence[str]) -> dict[str, int]:
    """{folder: row} of a classes file: by its names where each stands once among the classes, else by its indices."""
    entries = _entries(path)
    by_name = _rows_by_name({folder: name for folder, (name, _) in entries.items() if name}, class_names)
    if len(set(by_name.values())) == len(entries):
        return by_name
    by_index = {folder: index for folder, (_, index) in entries.items() if index is not None}
    if sorted(by_index.values()) != list(range(len(class_names))):
        if by_name:
            return by_name
        raise UserError(
            f"{path} has {len(entries)} classes and the text features {len(class_names)}, their names do not match; "
            "give the classes file that belongs to these text features."
        )
    agreeing = sum(by_index.get(folder) == row for folder, row in by_name.items())
    if 2 * agreeing < len(by_name):
        raise UserError(
            f"{path} and the text features name the same classes in another order: {agreeing} of {len(by_name)} equal "
            "names have the same index. Correct the index column or remove it."
        )
    return by_index


def _entries(path: Path) -> dict[str, tuple[str, int | None]]:
    """{folder: (name or "", index or None)} of a classes file."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return _json_entries(json.loads(text))
        if path.suffix == ".csv":
            return _json_entries(list(csv.DictReader(text.splitlines())))
    except OSError as error:
        raise UserError(f"The classes file {path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The classes file {path} is not understood ({type(error).__name__}: {error}); expected entries with "
            "wnid (or folder, or class) and index or name."
        ) from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    parts = [line.split(maxsplit=1) if WNID.match(line) else [line] for line in lines]
    return {part[0]: (part[1] if len(part) > 1 else part[0], row) for row, part in enumerate(parts)}


def _json_entries(content: list | dict) -> dict[str, tuple[str, int | None]]:
    if isinstance(content, list):
        return dict(_record(item, row) for row, item in enumerate(content))
    entries: dict[str, tuple[str, int | None]] = {}
    for key, value in content.items():
        if isinstance(
            value, list
        ):  # torchvision's and Keras's imagenet_class_index.json: {"0": ["n01440764", "tench"]}
            entries[value[0]] = (value[1], int(key))
        else:
            entries[key] = (value, None) if isinstance(value, str) else ("", int(value))
    return entries


def _record(item: str | dict, row: int) -> tuple[str, tuple[str, int | None]]:
    if isinstance(item, str):
        return item, (item, row)
    folder = next((item[key] for key in ("wnid", "folder", "class", "name") if key in item), None)
    if folder is None:
        raise KeyError("wnid")
    index = next((item[key] for key in ("index", "label") if key in item), None)
    return folder, (item.get("name") or "", None if index is None else int(index))
