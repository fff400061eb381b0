"""Image sets that a file lists: CSV manifests, and Tiny ImageNet's val_annotations.txt."""

from __future__ import annotations

import csv
import io
import os
import re
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from qatlab.core.contents import stamp
from qatlab.core.errors import UserError, nearest
from qatlab.core.files import user_path
from qatlab.data.images.classlists import Key
from qatlab.data.images.imageset import Files
from qatlab.data.images.walk import LISTED_AGAIN
from qatlab.data.textfiles import read_lines, read_text

COLUMNS = ("path", "label", "class", "group")
ANNOTATIONS = "val_annotations.txt"
# Table programs write whole numbers as 3.0 where another cell of the column is empty.
WHOLE = re.compile(r"-?[0-9]+(\.0*)?")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?|nan", re.IGNORECASE)
Record = tuple[str, Key | None, str]
"""(path of an image below its folder, class or None, group or "")."""


class Listed(Files):
    """The images that a list file names, in its order: the paths in ``records``, which start from ``folder``.

    An image that is listed again counts once. Raises UserError for a list without an image, for an image with two
    classes or groups, for a path that is no file, and, unless ``outside`` is true, for a path that leads out of
    ``folder``.
    """

    def __init__(self, listing: Path, folder: Path, records: Sequence[Record], outside: bool = False) -> None:
        self.path, self.listing = folder, listing
        if not records:
            raise UserError(f"{listing} lists no image; check that it is the right file.")
        first: dict[str, Record] = {}
        self.left_out = Counter()
        self._lines: list[int] = []  # the record (from 1 on) that each image came from, for error texts
        for line, record in enumerate(records, start=1):
            # "./a.png" and "a.png" are the same image.
            path = os.path.normpath(record[0])
            if path in first:
                _refuse_another(listing, first[path], record)
                self.left_out[LISTED_AGAIN, ""] += 1
                continue
            if not outside:
                _refuse_outside(listing, path, folder)
            first[path] = record
            self._lines.append(line)
        self.files: list[str] = [path for path, _, _ in first.values()]
        self.keys = [key for _, key, _ in first.values()]
        self.groups = [group for _, _, group in first.values()]
        # Every file is looked up now, so that a missing file ends the run before hours of work.
        self._stamps = [self._found(place) for place in range(len(self.files))]

    @property
    def source(self) -> Path:
        """Return the list file."""
        return self.listing

    def name(self, place: int) -> str:
        """Return the path of the image as in the list file, without a leading "./"."""
        return self.files[place]

    def without_class(self, place: int) -> str:
        """Return the error message for an image that the list gives no label."""
        return (
            f"{self.listing} gives {self.files[place]} (image {self._lines[place]} of the list) no label, yet its set "
            "needs one; add it (a column label or class) or leave the line out."
        )

    def stamps(self, places: Sequence[int]) -> list[bytes]:
        """Return the stamp of each file, 16 bytes, as it was when the list was read."""
        return [self._stamps[place] for place in places]

    def _found(self, place: int) -> bytes:
        named = (
            f"{self.listing} names {self.path / self.files[place]} (image {self._lines[place]} of the list), which is"
        )
        try:
            status = os.stat(self.file(place))
        except OSError as error:
            raise UserError(
                f"{named} not there; check the folder its paths start from (folder=) and that all was unpacked."
            ) from error
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{named} no regular file.")
        return stamp(self.file(place), status)


class Manifest(Listed):
    """The images of a CSV or TSV file with the column path, and optionally label, class and group.

    Paths start from ``folder``, by default the folder of the file. A label is a number in the set's class list, or the
    name or folder of a class; a class is a name or folder. If there are two columns, label and class, the class is
    only compared with the label. Raises UserError for other columns, for a line with more or fewer fields, and for a
    listed file that does not exist.
    """

    kind = "manifest"

    def __init__(self, path: str | Path, folder: str | Path | None = None, outside: bool = False) -> None:
        listing = user_path(path)
        rows = _rows(listing)
        # If the file has the two columns label and class, the label decides, and the class is kept in ``also`` as a
        # check.
        said = next((column for column in ("label", "class") if column in rows[0]), None) if rows else None
        keys = _keys([row[said] for row in rows], listing) if said else [None] * len(rows)
        records = [(row["path"], key, row.get("group", "")) for row, key in zip(rows, keys, strict=True)]
        super().__init__(listing, user_path(folder) if folder else listing.parent, records, outside)
        if said == "label" and "class" in rows[0]:
            self.also = [rows[line - 1]["class"] for line in self._lines]


class TinyAnnotations(Listed):
    """Tiny ImageNet's validation images as released: the folder ``images`` and a file with the WordNet id of each image.

    Raises UserError for a line that is not a name and an id with a tab between them.
    """

    kind = "tiny_imagenet"

    def __init__(self, path: str | Path) -> None:
        folder = user_path(path)
        listing = folder / ANNOTATIONS
        records: list[Record] = []
        # A line is the file, the WordNet id and four numbers of a box around the object, which is not used.
        for number, line in enumerate(read_lines(listing), start=1):
            fields = line.split("\t")
            if not line:
                continue
            if len(fields) < 2 or not all(fields[:2]):
                raise UserError(
                    f"{listing}, line {number}: '{fields[0][:80]}' is no image and WordNet id with a tab between them; "
                    "unpack the archive again."
                )
            records.append((f"images/{fields[0]}", fields[1], ""))
        super().__init__(listing, folder, records)


def _rows(listing: Path) -> list[dict[str, str]]:
    """Return the lines of a manifest as {column: text}, spaces around the texts removed."""
    delimiter = "\t" if listing.suffix == ".tsv" else ","
    reader = csv.reader(io.StringIO(read_text(listing)), delimiter=delimiter, skipinitialspace=True)
    rows: list[dict[str, str]] = []
    columns: list[str] = []
    try:
        for fields in reader:
            texts = [field.strip() for field in fields]
            if not columns:
                columns = texts
                _check_columns(listing, columns, delimiter)
            elif any(texts):
                # A path with a comma and no quotes would shift all further fields by one.
                if len(texts) != len(columns) or not texts[columns.index("path")]:
                    raise UserError(
                        f"{listing}, line {reader.line_num}, has {len(texts)} fields, expected a path and {len(columns)} in all "
                        f"({', '.join(columns)}); put a path with a '{delimiter}' in it into quotes."
                    )
                rows.append(dict(zip(columns, texts, strict=True)))
    except csv.Error as error:
        raise UserError(f"{listing}, line {reader.line_num}, is no line of a table: {error}.") from error
    return rows


def _check_columns(listing: Path, columns: list[str], delimiter: str) -> None:
    if twice := next((column for column in columns if columns.count(column) > 1), None):
        raise UserError(f"{listing} has the column '{twice}' twice; remove one.")
    if "path" in columns:
        return
    # With the wrong separator the whole header is read as one column.
    for other in ",;\t|":
        parts = [part.strip() for part in columns[0].split(other)]
        if "path" in parts:
            raise UserError(
                f"{listing} separates its columns by {other!r}, expected {delimiter!r}; a .csv has commas and a .tsv tabs."
            )
    raise UserError(
        f"{listing} has the columns {', '.join(columns) or '(none)'} and no 'path'{nearest('path', columns)}; a manifest has "
        f"{', '.join(COLUMNS)}, the last two where there are any."
    )


def _keys(texts: list[str], listing: Path) -> list[Key | None]:
    """Return the labels, None for an empty one: as integers if all are whole numbers, such as 3 or 3.0, else as texts."""
    given = [text for text in texts if text]
    if given and all(WHOLE.fullmatch(text) for text in given):
        return [int(text.split(".")[0]) if text else None for text in texts]
    if given and all(NUMBER.fullmatch(text) for text in given):
        # A column of numbers with a value such as 2.5 is damaged. As texts its values would be taken for class names.
        broken = next(text for text in given if not WHOLE.fullmatch(text))
        raise UserError(f"{listing} has the label {broken}, expected whole numbers (from 0 on) or names.")
    return [text or None for text in texts]


def _refuse_another(listing: Path, first: Record, second: Record) -> None:
    """Raise UserError where a list gives one image two classes or two groups."""
    if first[1:] != second[1:]:
        of_first, of_second = _words(first), _words(second)
        raise UserError(
            f"{listing} lists {second[0]} twice, as {of_first} and as {of_second}: an image has one label; remove one of the "
            "lines."
        )


def _words(record: Record) -> str:
    """Return class and group of a record in words, without an empty group."""
    return " ".join(str(part) for part in record[1:] if part != "")


def _refuse_outside(listing: Path, path: str, folder: Path) -> None:
    """Raise UserError for a path that leads out of the folder, because a list from elsewhere may name any file."""
    if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
        raise UserError(
            f"{listing} names {path}, which is not below {folder}: set the folder that its paths start from (folder=), or "
            "outside: true in the set if you trust the list."
        )
