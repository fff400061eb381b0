"""OpenOOD's imglist files: one image per line, its path and its label."""

from __future__ import annotations

import ast
from pathlib import Path

from qatlab.data.manifests import Listed, Record
from qatlab.errors import UserError


class ImgList(Listed):
    """The images of an imglist file (Zhang et al. 2023, OpenOOD v1.5), in its order.

    Each line is a path below ``folder`` and a label: a number, -1 for none, or a dict literal with "label" in it.
    Raises UserError for a line that says neither, and for a listed file that is not there.
    """

    kind = "imglist"

    def __init__(self, path: str | Path, folder: str | Path | None = None) -> None:
        listing = Path(path).expanduser()
        lines = listing.read_text(encoding="utf-8").splitlines()
        records = [_record(listing, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        super().__init__(listing, Path(folder).expanduser() if folder else listing.parent, records)


def _record(listing: Path, number: int, line: str) -> Record:
    try:
        if " {" in line:
            path, brace, said = line.partition(" {")
            label = int(ast.literal_eval(brace.strip() + said)["label"])
        else:
            path, said = line.rsplit(None, 1)
            label = int(said)
    except (ValueError, SyntaxError, KeyError, TypeError) as error:
        raise UserError(
            f"{listing}, line {number}: '{line[:80]}' is no path followed by a label (a number, or a dict with 'label')."
        ) from error
    return path.strip(), label, ""
