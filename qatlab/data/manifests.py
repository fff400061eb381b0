"""Image sets that a file lists: CSV manifests, and Tiny ImageNet's val_annotations.txt."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from qatlab.data.classlists import Key
from qatlab.data.sets import Layout, size_or_checksum
from qatlab.data.transforms import read_rgb
from qatlab.errors import UserError, nearest

COLUMNS = ("path", "label", "class", "group")
ANNOTATIONS = "val_annotations.txt"
Record = tuple[str, Key | None, str]
"""An image's path below its folder, its class and its group."""


class Listed(Layout):
    """Images that a file lists, in its order: ``folder`` / path of each of the ``records``.

    Raises UserError for a list without an image and for one that names a file that is not there.
    """

    def __init__(self, listing: Path, folder: Path, records: Sequence[Record]) -> None:
        self.path = folder
        if not records:
            raise UserError(f"{listing} lists no image; check that it is the right file.")
        self.files = [path for path, _, _ in records]
        self.keys = [key for _, key, _ in records]
        self.groups = [group for _, _, group in records]
        self._told = [_told(listing, folder / path, line) for line, path in enumerate(self.files, start=1)]

    def name(self, place: int) -> str:
        """Return the path as the file lists it."""
        return self.files[place]

    def identity(self, place: int) -> str:
        """Return the listed path and the size in bytes, or a checksum."""
        return f"{self.files[place]}/{self._told[place]}"

    def pixels(self, place: int) -> Tensor:
        """Return the decoded file."""
        return read_rgb((self.path / self.files[place]).read_bytes())


class Manifest(Listed):
    """The images of a CSV or TSV file with the columns path, label or class, and where there is one group.

    Paths start from ``folder``, by default the file's own. A label is a number in the set's class list, or like a class
    the name or folder of one. Raises UserError for other columns, and for a listed file that is not there.
    """

    kind = "manifest"

    def __init__(self, path: str | Path, folder: str | Path | None = None) -> None:
        listing = Path(path).expanduser()
        with listing.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, delimiter="\t" if listing.suffix == ".tsv" else ",")
            columns = list(rows.fieldnames or [])
            if "path" not in columns:
                raise UserError(
                    f"{listing} has the columns {', '.join(columns) or '(none)'} and no 'path'"
                    f"{nearest('path', columns)}; a manifest has {', '.join(COLUMNS)}, the last two where there are any."
                )
            content = [dict(row) for row in rows]
        said = next((column for column in ("label", "class") if column in columns), None)
        texts = [(row[said] or "").strip() for row in content] if said else []
        numbered = bool(texts) and all(re.fullmatch(r"-?\d+", text) for text in texts)
        keys = [int(text) if numbered else text or None for text in texts] if said else [None] * len(content)
        records = [(row["path"], key, row.get("group") or "") for row, key in zip(content, keys, strict=True)]
        super().__init__(listing, Path(folder).expanduser() if folder else listing.parent, records)


class TinyAnnotations(Listed):
    """Tiny ImageNet's validation images as released: ``images/`` and the file that says the WordNet id of each."""

    kind = "tiny_imagenet"

    def __init__(self, path: str | Path) -> None:
        folder = Path(path).expanduser()
        lines = (folder / ANNOTATIONS).read_text().splitlines()
        fields = [line.split("\t") for line in lines if line.strip()]
        super().__init__(folder / ANNOTATIONS, folder, [(f"images/{name}", wnid, "") for name, wnid, *_ in fields])


def _told(listing: Path, file: Path, line: int) -> str:
    try:
        return size_or_checksum(file)
    except OSError as error:
        raise UserError(
            f"{listing} names {file} (image {line} of the list), which is not there; check the folder its paths start "
            "from (folder=) and that all was unpacked."
        ) from error
