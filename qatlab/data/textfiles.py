"""Text files that users write: the same functions read every file of names, labels and lists."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from qatlab.core.errors import UserError

# The mark of UTF-32 begins with that of UTF-16, so UTF-32 is tried first.
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path) -> str:
    r"""Return the text of a file in UTF-8, or in the encoding of its byte order mark, with "\n" as line ends.

    Other encodings are not guessed, since a wrong guess gives wrong names. Raises UserError, naming the file and the
    line, for bytes that are no such text, and for a file that cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: the byte 0x{data[error.start]:02x} is no {encoding[:6].upper()}; save the file as UTF-8."
        ) from error
    # UTF-16 without a mark is valid UTF-8 with a NUL for every other letter: the text would pass as names.
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(
            f"{path}, line {line}, holds a NUL, so it is damaged or UTF-16 without its mark; save it as UTF-8."
        )
    # Windows and old Macintosh line ends become one kind, so that a line has one number on every system.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file without the spaces around them; blank lines are left out only at the end.

    Raises UserError as ``read_text`` does.
    """
    # Blank lines in between are kept, because the number of a line is the label of a class and is named in errors.
    return [line.strip() for line in read_text(path).rstrip().split("\n")]


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; raises UserError as ``read_text`` and ``parse_json`` do."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> Any:
    """Return what a JSON text holds; raises UserError, naming ``where``, for other text and for a key given twice."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise UserError(f"{where} is not understood: it is JSON nested too deeply.") from error
    except json.JSONDecodeError as error:
        # A trailing comma is the usual mistake of hand-written JSON. json names it from Python 3.13 on only.
        comma = text[: error.pos].rstrip().endswith(",") and text[error.pos : error.pos + 1] in ("]", "}")
        hint = "; a comma before the closing bracket?" if comma or "trailing comma" in error.msg else ""
        raise UserError(
            f"{where} is not understood: it is no JSON at line {error.lineno}, column {error.colno} ({error.msg}{hint})."
        ) from error
    except ValueError as error:
        raise UserError(f"{where} is not understood: {error}.") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json itself would silently keep the last of two equal keys.
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key '{key}' is given twice, so one of its values would be lost")
        found[key] = value
    return found
