"""Labelled image sets on disk: ``<class>/<file>`` trees, and flat folders for sets without labels."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from qatlab.data.transforms import BadImage, Preprocess
from qatlab.errors import UserError, nearest

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff"}
WNID = re.compile(r"n\d{8}")
PICK = re.compile(r"(-?\d+)?:(-?\d+)?(?::(-?\d+)?)?")


class ImageFolderSet(Dataset[tuple[Tensor, int]]):
    """The images under ``path`` as (image (3, S, S) uint8, label), in the sorted order of class folder and file.

    With ``class_index`` {class folder: label} every image lies in a class folder, at any depth; without it the tree
    may have any shape and each label is -1. ``exclude`` names folders to leave out; ``pick`` is a Python slice in
    text ("0::2", ":500") on what remains. Raises UserError for an empty set, a
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
        self.path = Path(path).expanduser()
        self.preprocess = preprocess
        chosen = _slice(pick)
        files = _without(self.path, _images(self.path), exclude)
        if class_index is not None:
            _check_folders(self.path, files, class_index)
        self.files = files[chosen]
        if not self.files:
            raise UserError(f"pick='{pick}' leaves none of the {len(files)} images under {self.path}; widen the slice.")
        self.labels = [-1 if class_index is None else class_index[file.parts[0]] for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        """Return a hash of which images these are: file names below the folder, their sizes and labels."""
        digest = hashlib.sha256()
        for file, label in zip(self.files, self.labels, strict=True):
            digest.update(f"{file.as_posix()}/{(self.path / file).stat().st_size}/{label}\n".encode())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file = self.path / self.files[index]
        try:
            return self.preprocess.decode(file.read_bytes()), self.labels[index]
        except (BadImage, OSError) as error:
            raise UserError(f"{file} cannot be read as an image: {error}. Replace it or delete it.") from error


def class_index_for(
    path: str | Path, class_names: Sequence[str], classes_file: str | Path | None = None, exclude: Sequence[str] = ()
) -> dict[str, int]:
    """Return {class folder: row of the text features} for the folders under ``path``.

    Folders are matched to ``class_names`` by ``classes_file`` when given (.json: a list of {index, wnid, name} or a
    dict from folder to row or name; .csv with such columns; .txt with one folder per line, its row being the line);
    else by equal names, where case, spaces and underscores do not count; else, when all are WordNet ids and as many
    as the names, in sorted order. ``exclude`` names folders to leave out. Raises UserError where a folder finds no
    row.
    """
    root = Path(path).expanduser()
    folders = [folder for folder in _class_folders(root) if folder not in set(exclude)]
    if classes_file is not None:
        rows = _rows_of_file(Path(classes_file).expanduser(), class_names)
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


def _without(root: Path, files: list[Path], exclude: Iterable[str]) -> list[Path]:
    present = {part for file in files for part in file.parts[:-1]}
    for name in exclude:
        if name not in present:
            raise UserError(f"exclude names '{name}', but {root} has no such folder of images{nearest(name, present)}.")
    out = set(exclude)
    return [file for file in files if out.isdisjoint(file.parts[:-1])]


def _check_folders(root: Path, files: list[Path], class_index: dict[str, int]) -> None:
    for file in files:
        if len(file.parts) == 1:
            raise UserError(
                f"{root / file} lies in no class folder, yet {root} is a labelled set; expected <class>/<file>."
            )
        if file.parts[0] not in class_index:
            name = file.parts[0]
            close = nearest(name, class_index)
            raise UserError(f"The class folder {root / name} matches no class name{close}; exclude or rename it.")


def _slice(text: str) -> slice:
    match = PICK.fullmatch(str(text).replace(" ", ""))
    if match is None or match[3] == "0":
        raise UserError(f"pick='{text}' is no slice; write start:stop:step like Python, for example '0::2' or ':500'.")
    return slice(*[int(part) if part else None for part in match.groups()])


def _class_folders(root: Path) -> list[str]:
    if not root.is_dir():
        raise UserError(f"The image folder {root} does not exist; check the suite's root and the set's path.")
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise UserError(f"{root} holds no class folders; a labelled set lies on disk as <class>/<file>.")
    return folders


def _plain(name: str) -> str:
    return re.sub(r"[\s_]+", " ", name).strip().lower()


def _rows_by_name(named: dict[str, str], class_names: Sequence[str]) -> dict[str, int]:
    """{folder: row} for the folders whose name stands exactly once among the classes."""
    rows: dict[str, int] = {}
    repeated: set[str] = set()
    for row, name in enumerate(map(_plain, class_names)):
        if name in rows:
            repeated.add(name)
        rows[name] = row
    return {folder: rows[_plain(name)] for folder, name in named.items() if _plain(name) in rows.keys() - repeated}


def _rows_of_file(path: Path, class_names: Sequence[str]) -> dict[str, int]:
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
