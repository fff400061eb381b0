"""The labels of a set's images, found by names, or by numbers if it is certain which class list they count in."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qatlab.core.errors import UserError
from qatlab.data.images.claims import NUMBERED, Claim, of_columns, of_numbers, of_paths, row_of
from qatlab.data.images.classlists import WNID, ClassList, Key, hint, load_class_list
from qatlab.data.images.imageset import Layout
from qatlab.data.images.numbers import Counting


def find_labels(
    layout: Layout, classes: ClassList, where: str, exclude: Sequence[str] = (), numbers: str = "auto"
) -> dict[Key, int | None]:
    """Return {key of the layout: label in ``classes``, or None for a class that only the larger list has}.

    Folders and names are matched to the names of the list. Numbers are matched by the class names that come with the
    dataset. Without these a number is a position in the list ("own") or in the larger list that it is a part of
    ("larger"), as ``numbers`` says; "auto" decides by the paths and by a second column. Raises UserError, naming
    ``where``, for a key of no class, for numbers whose list is not certain, and where a name and a number, or two
    names, disagree.
    """
    counting = Counting(classes, where, numbers, exclude)
    keys = {key: None for key in layout.keys if key is not None and str(key) not in exclude}
    columns = [claim for claim in of_columns(layout, classes) if claim.key in keys]

    # This is a function, because it reads every path of the layout, which sets with named folders do not need.
    def on_paths() -> list[Claim]:
        return [claim for claim in of_numbers(layout, classes) if claim.key in keys]

    rows: dict[Key, int]
    # Three kinds of labels: names or folders; numbers with names beside them; numbers alone.
    if not any(isinstance(key, int) for key in keys):
        texts = [str(key) for key in keys]
        if layout.kind == "folders":
            # Empty class folders are included, because numbers are certain only if all numbers of a list are present.
            texts += [folder for folder in layout.empty if folder not in exclude and _may_be(folder, classes)]
        found = text_rows(texts, counting, on_paths, layout.kind == "folders")
        rows = dict(found.items())
    elif layout.class_names and numbers == "auto":
        rows = _named(layout.class_names, [*keys], classes, where)
    else:
        # The user's option ``numbers`` goes before the paths, but not before a column of the same list.
        claims = columns if numbers != "auto" else [*columns, *on_paths()]
        rows = dict(counting.rows([int(key) for key in keys], claims).items())
    _refuse_two_words(rows, columns, classes, where)
    return {key: classes.label(row) for key, row in rows.items()}


def text_rows(
    texts: Sequence[str], counting: Counting, claims: Callable[[], list[Claim]] = list, folders: bool = True
) -> dict[str, int]:
    """Return {text: row in the whole list} for ``texts``, which are class folders or the classes in a list file.

    ``claims()`` gives the claims of the folders below class folders. WordNet ids are matched in sorted order if the
    list is made only of names and has as many. Raises UserError for a text of no class, for a number that contradicts
    the name behind it, for bare numbers whose list is not certain, and for two ``folders`` of one class.
    """
    classes, where = counting.classes, counting.where
    # Each text is the name of a class, a bare number, or neither ("lost").
    found = {text: row_of(text, classes) for text in texts}
    rows = {text: row for text, row in found.items() if row is not None}
    bare = {text: int(text) for text in texts if text not in rows and text.isdecimal()}
    lost = [text for text in texts if text not in rows and text not in bare]
    if len(lost) == len(texts) and _counts_wnids(lost, classes, where):
        return {wnid: row for row, wnid in enumerate(sorted(lost))}
    if lost:
        raise UserError(_lost(lost, len(texts), classes, where, folders))
    # A number in front of a name is a second statement on the class, and the two must agree.
    counting.refuse_other({text: int(number) for text, number in _numbers_before_names(rows, classes)}, rows)
    if bare:
        rows |= counting.bare(bare, len(texts), claims())
    first: dict[int, str] = {}
    for text, row in rows.items() if folders else ():
        # Two folders of one class are a mistake. In a list file two names of one class are only two spellings.
        if (other := first.setdefault(row, text)) != text:
            raise UserError(
                f"{where}: the folders '{other}' and '{text}' are both '{classes.whole.names[row]}' of "
                f"{classes.whole.name}; exclude or rename one of them."
            )
    return rows


def kept_by_path(layout: Layout, classes: ClassList, where: str) -> Callable[[int], bool]:
    """Return a function from an image's place to whether its path names one of ``classes``.

    It is for the images of a list that gives them no label (-1). Raises UserError, naming ``where``, for a path without
    a class.
    """
    rows = {place: claim.row for place, claim in of_paths(layout, range(len(layout)), classes)}
    if lost := next((layout.name(place) for place in range(len(layout)) if place not in rows), None):
        raise UserError(
            f"{where}: {lost} has the label -1, which stands for none, and no folder of its path is a class of "
            f"{classes.whole.name}; leave classes out, or give a list with labels."
        )
    return lambda place: classes.label(rows[place]) is not None


def _may_be(folder: str, classes: ClassList) -> bool:
    """Return whether a folder without an image may be a class folder; other empty folders are ignored."""
    wnid = classes.whole.bare and WNID.fullmatch(folder) is not None
    return wnid or folder.isdecimal() or row_of(folder, classes) is not None


def _numbers_before_names(rows: dict[str, int], classes: ClassList) -> list[tuple[str, str]]:
    """Return (folder, number) of the folders called by a number and a name, unless the whole text is the name of a class."""
    matches = [(text, NUMBERED.fullmatch(text)) for text in rows]
    return [(text, match[1]) for text, match in matches if match and match[2] and classes.row(text) is None]


def _counts_wnids(wnids: list[str], classes: ClassList, where: str) -> bool:
    """Return whether WordNet ids that match no name may be matched to the names in sorted order.

    They may if they are as many as the names. Raises UserError where ImageNet's own list shows that this order is
    wrong.
    """
    names = classes.whole.names
    if not classes.whole.bare or len(wnids) != len(names) or not all(map(WNID.fullmatch, wnids)):
        return False
    # ImageNet's list says which name belongs to an id. If it knows the id and the name, it can prove the order wrong.
    imagenet = load_class_list("imagenet1k")
    known = [(row, wnid, imagenet.own(wnid), imagenet.own(names[row])) for row, wnid in enumerate(sorted(wnids))]
    misplaced = [
        (row, wnid, at) for row, wnid, at, other in known if at is not None and other is not None and at != other
    ]
    # A few names may be other words for the same classes. If half of the known pairs disagree, the order is wrong.
    if misplaced and 2 * len(misplaced) >= sum(at is not None and other is not None for *_, at, other in known):
        row, wnid, at = misplaced[0]
        raise UserError(
            f"{where}: the {len(names)} class names are not in the order of the folders' WordNet ids: '{names[row]}' is name "
            f"{row}, and folder {row} is {wnid}, '{imagenet.names[at]}'; sort them, or say classes=imagenet1k."
        )
    return True


def _named(named: Sequence[str], keys: Sequence[Key], classes: ClassList, where: str) -> dict[Key, int]:
    """Return {number: row} of a dataset that comes with names for its numbers.

    Numbers are matched by these names, or by position where some names are spelled in another way. Raises UserError for
    a name of no class, for two numbers of one class, and for a number without a name.
    """
    named_rows = {number: row_of(name, classes) for number, name in enumerate(named)}
    known = {number: row for number, row in named_rows.items() if row is not None}
    # Names go before positions: a dataset may have the classes of a list in another order.
    places = known if len(known) == len(named) else _by_position(named, known, Counting(classes, where)) | known
    first: dict[int, int] = {}
    for number, name in enumerate(named):
        if number not in places:
            raise UserError(
                f"{where} names a class '{name}'{hint(name, classes)} that {classes.name} does not have; give the set "
                "another class list with classes=."
            )
        if (other := first.setdefault(places[number], number)) != number:
            raise UserError(
                f"{where}: its classes {other} ('{named[other]}') and {number} ('{name}') are both "
                f"'{classes.whole.names[places[number]]}' of {classes.whole.name}; give the set another class list with classes=."
            )
    if outside := [key for key in keys if key not in places]:
        raise UserError(
            f"{where} has the label {outside[0]}, outside the {len(named)} class names that come with it; download it again."
        )
    return {key: places[int(key)] for key in keys}


def _by_position(named: Sequence[str], known: dict[int, int], counting: Counting) -> dict[int, int]:
    """Return {number: row} by position, in the first list of the same length in which half of the names agree; else {}."""
    for listed, row in counting.readings():
        if len(listed) == len(named) and 2 * sum(row(number) == known[number] for number in known) >= len(named):
            return {number: row(number) for number in range(len(named))}
    return {}


def _refuse_two_words(rows: dict[Key, int], columns: Sequence[Claim], classes: ClassList, where: str) -> None:
    names = classes.whole.names
    for claim in columns:
        # A label without a row was excluded; its claim is ignored.
        if rows.get(claim.key, claim.row) != claim.row:
            raise UserError(
                f"{where}: the label '{claim.key}' is '{names[rows[claim.key]]}', yet {claim.text} says '{names[claim.row]}'; "
                "correct the one that is wrong, or remove its column."
            )


def _lost(lost: list[str], among: int, classes: ClassList, where: str, folders: bool) -> str:
    shown = ", ".join(f"'{text}'{hint(text, classes)}" for text in lost[:3])
    what = f"class folders under {where}" if folders else f"classes that {where} names"
    remedy = "rename or exclude them" if folders else "correct them"
    return (
        f"{len(lost)} of {among} {what} have no counterpart in {classes.name}: {shown}; {remedy}, or give the set another "
        "class list with classes= (a list, or a file that maps them to names)."
    )
