"""Class lists: the folders and names of a dataset's classes in label order, and which of a larger list they are."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from qatlab.errors import UserError, nearest

Key = str | int
"""How a dataset says the class of an image: by folder, by name or by number."""


def plain(name: str) -> str:
    """Return a class name as names are compared: case, spaces, underscores and hyphens do not count."""
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


@dataclass(frozen=True)
class ClassList:
    """Classes in label order: the ``folders`` they lie in on disk (WordNet ids or names) and the ``names`` of prompts.

    ``of`` is the larger list whose ``rows`` these classes are. ``aliases`` are further names of each class, and
    ``backgrounds`` {"common" | "counter": one per class} those of spurious-cue sets. ``bare`` lists are made of names
    alone: their folders are guesses.
    """

    name: str
    names: list[str]
    folders: list[str]
    aliases: list[list[str]] = field(default_factory=list)
    of: ClassList | None = None
    rows: list[int] = field(default_factory=list)
    backgrounds: dict[str, list[str]] = field(default_factory=dict)
    bare: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def find(self, key: Key) -> int | None:
        """Return the label of a folder, name or number; None for a class of the larger list only.

        A number counts in the larger list where there is one, as ImageNet's subsets are labelled. A folder may carry a
        number before its name ("9 ostrich"). Raises KeyError for what is no class at all.
        """
        if isinstance(key, int):
            return self._numbered(key)
        texts = [plain(key)]
        numbered = re.fullmatch(r"(\d+)(?:[\s_-]+(.+))?", key)
        if numbered and numbered[2]:
            texts.append(plain(numbered[2]))
        for text in texts:
            if text in self._labels:
                return self._labels[text]
            if self.of is not None and text in self.of._labels:
                return self._of_row.get(self.of._labels[text])
        if numbered:
            return self._numbered(int(numbered[1]))
        raise KeyError(key)

    @property
    def known(self) -> list[str]:
        """Return the folders and names that ``find`` takes, for telling the nearest."""
        return list(dict.fromkeys([*self.folders, *self.names]))

    def _numbered(self, number: int) -> int | None:
        if not 0 <= number < len(self.of or self):
            raise KeyError(number)
        return self._of_row.get(number) if self.of is not None else number

    @cached_property
    def _of_row(self) -> dict[int, int]:
        return {row: label for label, row in enumerate(self.rows)}

    @cached_property
    def _labels(self) -> dict[str, int]:
        """Labels by folder, name or alias, in this order; what two classes share names neither."""
        labels = {plain(folder): label for label, folder in enumerate(self.folders)}
        taken: set[str] = set()
        for texts in ([[name] for name in self.names], self.aliases):
            groups = [{plain(text) for text in group} for group in texts]
            counts = Counter(text for group in groups for text in group)
            unique = [(text, label) for label, group in enumerate(groups) for text in group if counts[text] == 1]
            labels = {text: label for text, label in unique if text not in taken} | labels
            taken |= counts.keys()  # an alias is none where it is a name, of one class or of two
        return labels


def named_classes(names: Sequence[str]) -> ClassList:
    """Return a list made of class names alone; folders are then called as the classes."""
    counts = Counter(map(plain, names))
    # Two classes of one name can have no folder called so.
    folders = [name if counts[plain(name)] == 1 else f"{name} (row {row})" for row, name in enumerate(names)]
    return ClassList(f"the {len(names)} class names", list(names), folders, bare=True)


def class_list_names() -> list[str]:
    """Return the names of the class lists that come with qatlab."""
    return sorted(Path(str(file)).stem for file in (files("qatlab") / "assets" / "classes").iterdir())


@lru_cache
def load_class_list(name: str) -> ClassList:
    """Return one of the class lists that come with qatlab; raises UserError for another name."""
    if name not in (known := class_list_names()):
        raise UserError(f"There is no class list '{name}'{nearest(name, known)}; there are {', '.join(known)}.")
    content: dict[str, Any] = json.loads((files("qatlab") / "assets" / "classes" / f"{name}.json").read_text("utf-8"))
    backgrounds: dict[str, list[str]] = {role: content[role] for role in ("common", "counter") if role in content}
    if "of" not in content:
        aliases = content.get("aliases", [])
        return ClassList(name, content["names"], content["folders"], aliases, backgrounds=backgrounds)
    larger, rows = load_class_list(content["of"]), content["rows"]
    own = content.get("aliases", [[]] * len(rows))
    aliases = [
        [larger.names[row], *(larger.aliases[row] if larger.aliases else []), *more]
        for row, more in zip(rows, own, strict=True)
    ]
    names = content.get("names") or [larger.names[row] for row in rows]
    return ClassList(name, names, [larger.folders[row] for row in rows], aliases, larger, rows, backgrounds)


def rows_in(classes: ClassList, head: ClassList, where: str) -> list[int]:
    """Return the row of ``head`` for each of ``classes``; raises UserError, naming ``where``, for a class that has none."""
    if classes is head:
        return list(range(len(head)))
    if classes.of is not None and classes.of.names == head.names:
        return list(classes.rows)
    rows = [_row(classes, label, head) for label in range(len(classes))]
    if lost := [classes.names[label] for label, row in enumerate(rows) if row is None]:
        raise UserError(
            f"{where}: {len(lost)} of the {len(classes)} classes of {classes.name} are not among those of its reference "
            f"({head.name}), for example '{lost[0]}'; give it another reference or role: id."
        )
    return [row for row in rows if row is not None]


def _row(classes: ClassList, label: int, head: ClassList) -> int | None:
    for text in (classes.folders[label], classes.names[label]):
        if plain(text) in head._labels:
            return head._labels[plain(text)]
    return None


def find_all(
    keys: Iterable[Key], classes: ClassList, where: str, named: Sequence[str] | None = None
) -> dict[Key, int | None]:
    """Return {key: label in ``classes``, or None where only the larger list has it}.

    ``named`` are the names that the dataset gives to its numbers. Raises UserError, naming ``where``, for keys that are
    no class: a folder that no name matches, a number outside the list.
    """
    keys = list(dict.fromkeys(keys))
    numbers = _positions(classes, named, where) if named else {}
    found: dict[Key, int | None] = {}
    lost = []
    for key in keys:
        try:
            if named and isinstance(key, int):
                found[key] = numbers[key]
            else:
                found[key] = classes.find(key)
        except KeyError:
            lost.append(key)
    if lost:
        raise UserError(_lost(lost, keys, classes, where))
    return found


def _positions(classes: ClassList, named: Sequence[str], where: str) -> dict[int, int | None]:
    """{number: label} of a dataset that names its numbers: by those names, or by position where names differ in spelling."""
    found: dict[int, int | None] = {}
    for number, name in enumerate(named):
        try:
            found[number] = classes.find(name)
        except KeyError:
            continue
    if len(found) == len(named):
        return found
    for same, label in ((classes, lambda number: number), (classes.of, classes._of_row.get)):
        if same is not None and len(same) == len(named):
            places = {number: label(number) for number in range(len(named))}
            if 2 * sum(found[number] == places[number] for number in found) >= len(named):
                return places
    strange = next(name for number, name in enumerate(named) if number not in found)
    raise UserError(
        f"{where} names a class '{strange}'{nearest(strange, classes.known)} that {classes.name} does not have; give the "
        "set another class list with classes=."
    )


def _lost(lost: list[Key], keys: list[Key], classes: ClassList, where: str) -> str:
    if isinstance(lost[0], int):
        return (
            f"{where} has the label {lost[0]}, outside the {len(classes.of or classes)} classes of "
            f"{(classes.of or classes).name}; give the set the class list that its labels count in."
        )
    shown = ", ".join(f"'{key}'{nearest(str(key), classes.known)}" for key in lost[:3])
    return (
        f"{len(lost)} of {len(keys)} class folders under {where} have no counterpart in {classes.name}: {shown}; rename or "
        "exclude them, or give the set another class list with classes=."
    )
