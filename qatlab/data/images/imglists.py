"""OpenOOD's imglist files: one image per line, its path and its label."""

from __future__ import annotations

import ast
from pathlib import Path

from qatlab.core.errors import UserError
from qatlab.core.files import user_path
from qatlab.data.images.manifests import Listed, Record
from qatlab.data.textfiles import read_lines


class ImgList(Listed):
    """The images of an imglist file (Zhang et al. 2023, OpenOOD v1.5), in its order.

    Each line is a path below ``folder`` and a label: a number, -1 for none, or a dict literal with "label" in it.
    Raises UserError for a line that says neither, and for a listed file that is not there.
    """

    kind = "imglist"

    def __init__(self, path: str | Path, folder: str | Path | None = None, outside: bool = False) -> None:
        listing = user_path(path)
        # Lines are numbered before blank ones are left out, so that an error names the same line as an editor.
        lines = enumerate(read_lines(listing), start=1)
        records = [_record(listing, number, line) for number, line in lines if line]
        super().__init__(listing, user_path(folder) if folder else listing.parent, records, outside)


def _record(listing: Path, number: int, line: str) -> Record:
    try:
        # OpenOOD writes a dict where a line says more than a label. literal_eval reads values and runs no code.
        if " {" in line:
            path, brace, said = line.partition(" {")
            label = int(ast.literal_eval(brace.strip() + said)["label"])
        else:
            # Only the last word is the label, because a path may contain spaces.
            path, said = line.rsplit(None, 1)
            label = int(said)
    except (ValueError, SyntaxError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(
            f"{listing}, line {number}: '{line[:80]}' is no path followed by a label (a number, or a dict with 'label')."
        ) from error
    return path.strip(), label, ""
