"""Claims: second statements on the class of an image besides its label, by the folders of its path or a list's column.

Labels that are numbers are compared with claims, in order to find out which class list the numbers count in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qatlab.data.images.classlists import ClassList, Key
from qatlab.data.images.imageset import Layout

# Matches "7" and "007 - great white shark": a number, and perhaps a name behind it.
NUMBERED = re.compile(r"(\d+)(?:[\s_-]+(.+))?", re.ASCII)
# A WordNet id inside a file name, as in ILSVRC2012_val_00000293_n01440764.JPEG; not a part of a longer word or number.
IN_FILE_NAME = re.compile(r"(?<![A-Za-z0-9])n\d{8}(?!\d)")


@dataclass(frozen=True)
class Claim:
    """The statement that the label ``key`` means the class in ``row`` of the whole class list.

    ``text`` names where it is found; ``path`` is true for the path of an image, and false for the column of a list.
    """

    key: Key
    row: int
    text: str
    path: bool = True


def row_of(text: str, classes: ClassList) -> int | None:
    """Return the row in the whole list of the class called ``text``, which may begin with a number; None for no class."""
    # The whole text is tried first, because the name of a class may itself begin with a number.
    match = NUMBERED.fullmatch(text)
    row = classes.row(text)
    return classes.row(match[2]) if row is None and match and match[2] else row


def of_paths(layout: Layout, places: Iterable[int], classes: ClassList) -> Iterator[tuple[int, Claim]]:
    """Yield (place, claim) of the images whose path names a class, by its deepest such folder or a WordNet id in the file name.

    In a tree of class folders the first folder is the label itself, and only the folders below it count.
    """
    # In a class folder tree the first folder is the label that a claim would judge.
    skipped = 1 if layout.kind == "folders" else 0
    known: dict[tuple[str, ...], int | None] = {}
    for place in places:
        *folders, file = layout.name(place).split("/")[skipped:]
        wnid = IN_FILE_NAME.search(file)
        # The deepest folder is tried first, because a folder above it may be the name of a split or of a corruption.
        parts = (*folders[::-1], *([wnid[0]] if wnid else []))
        # Thousands of images share their folders, so each chain of folders is looked up once.
        if parts and parts not in known:
            found = (row_of(part, classes) for part in parts)
            known[parts] = next((row for row in found if row is not None), None)
        key, row = layout.keys[place], known.get(parts)
        if key is not None and row is not None:
            yield place, Claim(key, row, f"the path {layout.name(place)}")


def of_numbers(layout: Layout, classes: ClassList) -> list[Claim]:
    """Return the claims of paths about labels that are numbers, each pair of number and class once.

    Where all claims name the same class, the result is empty: the folder is then rather the name of a split, such as
    ``train``, which is also a class of CIFAR-100. For a tree of class folders ``Counting.bare`` makes this decision.
    """
    places = (place for place, key in enumerate(layout.keys) if isinstance(key, int) or (key or "").isdecimal())
    found = {(claim.key, claim.row): claim for _, claim in of_paths(layout, places, classes)}
    # A class that all numbers have in common is the name of a split or of the set, which is equal to a class by chance.
    one = len({row for _, row in found}) == 1 and len({*layout.keys}) > 1
    return [] if one and layout.kind != "folders" else list(found.values())


def of_columns(layout: Layout, classes: ClassList) -> list[Claim]:
    """Return the claims of a list's column "class" about its labels, each pair of label and class once."""
    found: dict[tuple[Key, str], Claim] = {}
    for key, text, place in zip(layout.keys, layout.also, range(len(layout)), strict=False):
        if key is not None and (key, text) not in found and (row := row_of(text, classes)) is not None:
            found[key, text] = Claim(key, row, f"the class column of {layout.name(place)}", False)
    return list(found.values())
