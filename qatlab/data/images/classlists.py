"""Class lists: the folders and names of a dataset's classes in label order, and their rows in a larger list."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from qatlab.core.errors import UserError, nearest

WNID = re.compile(r"n\d{8}")
Key = str | int
"""The class of an image as a dataset gives it: a folder, a name or a number."""


def spaced(name: str) -> str:
    """Return a class name in NFC, without invisible characters, with one space for spaces, underscores and hyphens."""
    # Category Cf holds invisible characters, such as the zero-width space that copying from a web page leaves.
    seen = "".join(c for c in unicodedata.normalize("NFC", name) if unicodedata.category(c) != "Cf")
    return re.sub(r"[\s_-]+", " ", seen).strip()


def plain(name: str) -> str:
    """Return a class name as ``spaced`` does, in lower case, for comparisons in which case does not count."""
    return spaced(name).lower()


@dataclass(frozen=True)
class ClassList:
    """Classes in label order: their ``folders`` on disk (WordNet ids or names) and their ``names`` in prompts.

    A list may be a part of a larger one: then ``of`` is the larger list, and ``rows`` are the rows of these classes in
    it. ``aliases`` are further names of each class. ``backgrounds`` {"common" | "counter": a background per class} are
    for spurious-cue sets. A ``bare`` list is made only of names, so that its folders are guesses.
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

    @property
    def whole(self) -> ClassList:
        """Return the larger list that this one is a part of, or this list itself."""
        return self.of or self

    def row(self, text: str) -> int | None:
        """Return the row in the ``whole`` list of the class that a folder or name means; None for no class or several."""
        rows = self.meant(text)
        return rows[0] if len(rows) == 1 else None

    def meant(self, text: str) -> list[int]:
        """Return the rows in the ``whole`` list of the classes that a folder or name may mean; one row if it is clear.

        An equal name goes before a name that differs in case: in torchvision 'Cardigan' is a dog and 'cardigan' the
        jacket. A name means two classes if they share it, or if it is one class in this list and another one in the
        whole list.
        """
        # The spelling without case is tried only if no class has the exact spelling.
        for cased in (True, False):
            spelled = spaced(text) if cased else plain(text)
            (own, _), (labels, shared) = self._tables[cased], self.whole._tables[cased]
            rows = shared.get(spelled, [])
            if not rows and spelled in own:
                rows = [self.rows[own[spelled]] if self.of is not None else own[spelled]]
            # The name may be one class in this list and another in the whole list. Then the two rows are returned, and
            # the caller has to ask the user.
            if spelled in labels and labels[spelled] not in rows:
                rows = [*rows, labels[spelled]]
            if rows:
                return rows
        return []

    def find(self, text: str) -> int | None:
        """Return the label of a folder or name; None for a class that only the larger list has; KeyError for no class."""
        if (row := self.row(text)) is None:
            raise KeyError(text)
        return self.label(row)

    def label(self, row: int) -> int | None:
        """Return the label of a row of the ``whole`` list; None for a class that this list does not have."""
        return self._of_row.get(row) if self.of is not None else row

    def own(self, text: str) -> int | None:
        """Return the label of a folder or name in this list, without a look into the larger one; None for no class."""
        found = self._tables[True][0].get(spaced(text))
        return self._tables[False][0].get(plain(text)) if found is None else found

    @property
    def known(self) -> list[str]:
        """Return the folders and names of the classes, from which error messages propose the nearest one."""
        return list(dict.fromkeys([*self.folders, *self.names]))

    @cached_property
    def _of_row(self) -> dict[int, int]:
        return {row: label for label, row in enumerate(self.rows)}

    @cached_property
    def _tables(self) -> dict[bool, tuple[dict[str, int], dict[str, list[int]]]]:
        return {True: self._table(spaced), False: self._table(plain)}

    def _table(self, spell: Callable[[str], str]) -> tuple[dict[str, int], dict[str, list[int]]]:
        """Return ({text: label} of folders, names and aliases, {text: labels} of texts that several classes share).

        Texts are spelled by ``spell``. A folder goes before a name, and a name before an alias.
        """
        labels = {spell(folder): label for label, folder in enumerate(self.folders)}
        shared: dict[str, list[int]] = {}
        for texts in ([[name] for name in self.names], self.aliases):
            # Names are settled before aliases: an alias of one class must not hide the name of another.
            claims: dict[str, list[int]] = {}
            for label, group in enumerate(texts):
                # dict.fromkeys, because a class may have two aliases that ``spell`` makes equal.
                for text in dict.fromkeys(map(spell, group)):
                    claims.setdefault(text, []).append(label)
            # A text that is already a folder or a name is not used as an alias.
            new = {text: of for text, of in claims.items() if text not in labels and text not in shared}
            shared |= {text: of for text, of in new.items() if len(of) > 1}
            labels |= {text: of[0] for text, of in new.items() if len(of) == 1}
        return labels, shared


def named_classes(names: Sequence[str]) -> ClassList:
    """Return a ``bare`` list made of class names; its folders are guessed to have the same names."""
    counts = Counter(map(plain, names))
    # Two classes with the same name cannot share a folder, so their folders get a text that no folder on disk has.
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
    further = content.get("aliases", [[]] * len(rows))
    aliases = []
    # A part of a list may have other names for its prompts. The names of the larger list stay valid as aliases.
    for row, more in zip(rows, further, strict=True):
        inherited = larger.aliases[row] if larger.aliases else []
        aliases.append([larger.names[row], *inherited, *more])
    names = content.get("names") or [larger.names[row] for row in rows]
    return ClassList(name, names, [larger.folders[row] for row in rows], aliases, larger, rows, backgrounds)


def rows_in(classes: ClassList, head: ClassList, where: str) -> list[int]:
    """Return the row of ``head`` for each of ``classes``; raises UserError, naming ``where``, for a class that has none."""
    if classes is head:
        return list(range(len(head)))
    # The head has the names of the larger list in the same order, so rows of the larger list are rows of the head.
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
    """Return the row of ``head`` of the class ``label``, found by folder or by name; None where ``head`` has no such class."""
    # The folder is tried first, because a WordNet id has one meaning and a name may have several.
    larger = classes.of.names[classes.rows[label]] if classes.of is not None else classes.names[label]
    found = (head.own(text) for text in (classes.folders[label], larger, classes.names[label]))
    return next((row for row in found if row is not None), None)


def restricted(whole: ClassList, names: Sequence[str], where: str) -> ClassList:
    """Return the part of ``whole`` that has the classes ``names``, in this order.

    Raises UserError, naming ``where``, for a name of no class and for two names of one class.
    """
    labels = [whole.own(name) for name in names]
    if None in labels:
        lost = names[labels.index(None)]
        raise UserError(f"{where} names '{lost}'{hint(lost, whole)}, which is no class of {whole.name}.")
    chosen = [label for label in labels if label is not None]
    label, times = Counter(chosen).most_common(1)[0]
    if times > 1:
        raise UserError(f"{where} names the class '{whole.names[label]}' {times} times.")
    aliases = [[whole.names[label], *(whole.aliases[label] if whole.aliases else [])] for label in chosen]
    # Where ``whole`` is itself a part of a larger list, the rows are those of the larger list.
    rows = [whole.rows[label] if whole.of is not None else label for label in chosen]
    folders = [whole.folders[label] for label in chosen]
    # A user may give the folder of a class, for example a WordNet id, which is no text for a prompt: the name replaces
    # it.
    texts = [
        whole.names[label] if name == whole.folders[label] else name for name, label in zip(names, chosen, strict=True)
    ]
    backgrounds: dict[str, list[str]] = {}
    for role, of_classes in whole.backgrounds.items():
        backgrounds[role] = [of_classes[label] for label in chosen]
    title = f"the {len(names)} classes of {where}"
    return ClassList(title, texts, folders, aliases, whole.whole, rows, backgrounds, bare=whole.bare)


def hint(text: str, classes: ClassList) -> str:
    """Return the hint of an error for a text that means no class, " (did you mean 'x'?)", or that means several classes."""
    if len(rows := classes.meant(text)) > 1:
        called = " and ".join(classes.whole.folders[row] for row in rows)
        return f" ({'two' if len(rows) == 2 else len(rows)} classes are called so: {called})"
    return nearest(text, classes.known)
