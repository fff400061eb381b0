"""Files that map the class folders of a dataset to class names: JSON, CSV or plain text."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qatlab.core.errors import UserError
from qatlab.data.images.classlists import WNID, named_classes, spaced
from qatlab.data.textfiles import read_json, read_lines, read_text

Entry = tuple[str, str, int | None]
"""A class folder, its name ("" where none is given) and its index."""


def file_rows(path: Path, class_names: Sequence[str]) -> dict[str, int]:
    """Return {folder: row} of a classes file: by its names if each names a different class, else by its indices.

    Raises UserError for a file that is not understood, for a file of other classes, and for an index that contradicts
    the name beside it, or without a name the folder.
    """
    entries = _entries(path)
    indices = {folder: index for folder, _, index in entries if index is not None}
    by_name = _rows_by_name({folder: name for folder, name, _ in entries if name}, class_names)
    # If every entry names a different class, the names are enough, and the indices do not matter.
    if len({*by_name.values()}) == len(entries):
        return by_name
    by_folder = _rows_by_name({folder: folder for folder, name, _ in entries if not name}, class_names)
    # Indices can be rows only where each row from 0 on occurs once.
    counted = sorted(indices.values()) == list(range(len(class_names)))
    said = (by_name | by_folder) if counted else by_folder
    names = {folder: name or folder for folder, name, _ in entries}
    wrong = [folder for folder, row in said.items() if indices.get(folder, row) != row]
    # Names that differ only in case may be two classes (in ImageNet 'Cardigan' is a dog): only an equal spelling is
    # sure.
    sure = [folder for folder in wrong if spaced(names[folder]) == spaced(class_names[said[folder]])]
    # A few names that differ in case may be chance. If more than half of the names are in other rows, the order
    # differs.
    if sure or 2 * len(wrong) > len(said):
        folder = (sure or wrong)[0]
        raise UserError(
            f"{path} and the class names have the same classes in another order: {len(wrong)} of {len(said)} equal names have "
            f"another index, such as '{names[folder]}', {indices[folder]} in the file and {said[folder]} among the names. "
            "Correct the indices or remove them."
        )
    if counted:
        return indices
    if by_name or by_folder:
        return by_name | by_folder
    raise UserError(
        f"{path} has {len(entries)} classes and the text features {len(class_names)}, their names do not match; "
        "give the classes file that belongs to these text features."
    )


def _rows_by_name(named: dict[str, str], class_names: Sequence[str]) -> dict[str, int]:
    """Return {folder: row} of the folders whose name is the name of a class.

    A folder with the exact name of a class goes before a folder whose name differs in case.
    """
    classes = named_classes(class_names)
    found: dict[str, int] = {}
    for folder, name in named.items():
        row = classes.own(name)
        if row is not None:
            found[folder] = row
    exact = {folder: row for folder, row in found.items() if spaced(named[folder]) == spaced(class_names[row])}
    # If a folder has the exact name of a class, a folder whose name differs in case is not the same class.
    taken = {*exact.values()}
    return {folder: row for folder, row in found.items() if folder in exact or row not in taken}


def _entries(path: Path) -> list[Entry]:
    try:
        if path.suffix == ".json":
            entries = _json_entries(read_json(path))
        elif path.suffix == ".csv":
            entries = [
                _record(row, None) for row in csv.DictReader(io.StringIO(read_text(path)), skipinitialspace=True)
            ]
        else:
            entries = [_line(line, row) for row, line in enumerate(read_lines(path))]
        folders = [folder for folder, *_ in entries]
        if twice := [folder for folder, times in Counter(folders).items() if times > 1]:
            raise ValueError(f"'{twice[0]}' is there twice")
        if not entries:
            raise ValueError("it is empty")
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"The classes file {path} is not understood ({error}); expected entries with wnid (or folder, or class) and "
            "index or name."
        ) from error
    return entries


def _line(line: str, row: int) -> Entry:
    """Return the entry of a text line, a folder or a WordNet id with a name after it; its index is the line's number."""
    if not line:
        raise ValueError(f"line {row + 1} is blank, and a class's line is its index")
    first, *name = line.split(maxsplit=1) if WNID.match(line) else [line]
    return first, name[0] if name else first, row


def _json_entries(content: Any) -> list[Entry]:
    if isinstance(content, list):
        return [_record(item, row) for row, item in enumerate(content)]
    if not isinstance(content, dict):
        raise ValueError(f"it holds {str(content)[:40]}, neither a list nor a dict")
    return [_pair(key, value) for key, value in content.items()]


def _pair(key: str, value: Any) -> Entry:
    """Return the entry of {folder: name} or {folder: index}, or of a line of imagenet_class_index.json."""
    # torchvision and Keras use imagenet_class_index.json, which maps an index to WordNet id and name:
    # {"0": ["n01440764", "tench"]}.
    if isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value):
        return value[0], value[1], _index(key)
    if isinstance(value, str):
        return key, value, None
    return key, "", _index(value)


def _record(item: Any, row: int | None) -> Entry:
    if isinstance(item, str):
        return item, item, row
    if not isinstance(item, dict):
        raise ValueError(f"the entry {str(item)[:60]} is neither a name nor a record")
    # The most exact key is tried first: a record of ImageNet may have a WordNet id and a name, and the id is the
    # folder.
    folder = next((item[key] for key in ("wnid", "folder", "class", "name") if item.get(key) not in (None, "")), None)
    if folder is None:
        raise ValueError(f"an entry has neither wnid, folder, class nor name: {str(item)[:60]}")
    index = next((item[key] for key in ("index", "label") if item.get(key) not in (None, "")), None)
    return str(folder), str(item.get("name") or ""), None if index is None else _index(index)


def _index(value: Any) -> int:
    # JSON's true is an int to Python, and would pass as the index 1.
    if isinstance(value, bool) or not str(value).strip().isdecimal():
        raise ValueError(f"'{str(value)[:40]}' is no index")
    return int(value)
