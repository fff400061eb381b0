"""Class names that a user gives in an option: as a list, as a file, or as numbers with names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qatlab.core.errors import UserError
from qatlab.core.files import user_path
from qatlab.data.textfiles import read_json, read_lines


def read_names(given: Any, key: str, root: Path) -> list[str] | None:
    """Return the class names in label order from the value ``given`` of the option ``key``; None for no value.

    The value is a list of names, a list of records {index, name}, a mapping {index: name}, or a text. A text is the
    path of a file below ``root``: .txt with a name per line, or .json with one of these lists or mappings. Raises
    UserError for another file, and where there is not exactly one name for each label.
    """
    if given is None:
        return None
    if not isinstance(given, str):
        return _names(given, key)
    path = root / user_path(given)
    if path.suffix not in (".txt", ".json"):
        raise UserError(f"{key}={given} is no .txt or .json file; give one of these, or a list of names.")
    if not path.is_file():
        raise UserError(f"{key}={given}: there is no file {path}; give a .txt, a .json or a list.")
    if path.suffix == ".json":
        return _names(read_json(path), str(path))
    # The number of a line is the label, so a blank line is a class without a name.
    lines = read_lines(path)
    if "" in lines:
        raise UserError(
            f"{path}, line {lines.index('') + 1}, is blank, and a class's line is its label: name the class, remove the line, or "
            'write the names as .json, where "" may be one.'
        )
    return lines


def _names(content: Any, where: str) -> list[str]:
    if isinstance(content, dict) and content:
        # The numbers are the labels, so that the order in the file does not matter.
        content = _in_order(list(content.items()), where)
    elif isinstance(content, list) and content and all(isinstance(entry, dict) for entry in content):
        content = _in_order([(_part(entry, "index", where), _part(entry, "name", where)) for entry in content], where)
    if not isinstance(content, list) or not content:
        raise UserError(
            f"{where} holds no class names; expected a list of names, of records with index and name, or {{0: name}}."
        )
    return [_name(entry, label, where) for label, entry in enumerate(content)]


def _name(entry: Any, label: int, where: str) -> str:
    # A whole number is accepted, because the class of a digit may be called so. A bool is refused, because YAML reads
    # the words yes, no, on and off as bools.
    if isinstance(entry, bool) or not isinstance(entry, str | int):
        more = "; YAML takes yes, no, on and off for that, so quote the name" if isinstance(entry, bool) else ""
        raise UserError(f"{where}: the name of class {label} is {entry!r}, expected text{more}.")
    return str(entry)


def _part(record: dict[str, Any], field: str, where: str) -> Any:
    if field not in record:
        raise UserError(f"{where} has a record without {field} ({str(record)[:60]}); each class needs index and name.")
    return record[field]


def _in_order(pairs: Sequence[tuple[Any, Any]], where: str) -> list[Any]:
    """Return the names in the order of their numbers; raises UserError unless these are 0, 1, 2 and so on."""
    named = {int(number): name for number, name in pairs if str(number).isdecimal()}
    # A gap, a repeated number or a text that is no number would give other labels a wrong name.
    if len(named) < len(pairs) or sorted(named) != list(range(len(pairs))):
        strange = next((number for number, _ in pairs if not str(number).isdecimal()), None)
        found = (
            f"'{strange}' is no number" if strange is not None else f"there are {sorted(named)[:3]} ... {max(named)}"
        )
        raise UserError(
            f"{where}: the {len(pairs)} classes need the numbers 0 to {len(pairs) - 1}, each once, and {found}."
        )
    return [named[number] for number in sorted(named)]
