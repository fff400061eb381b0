"""The sets of a suite on disk: where each was looked for, how it lies there, which classes it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from qatlab.config import SetConfig, SuiteConfig
from qatlab.data.classlists import ClassList, Key, class_list_names, find_all, load_class_list, named_classes, rows_in
from qatlab.data.corruptions import Corrupt
from qatlab.data.embedded import CLASS_NAMES, EmbeddedSet
from qatlab.data.entries import EMBEDDED, LABELLED, SPURIOUS, is_rendered, reference_of, refuse_empty, suite_class_names
from qatlab.data.images import Folders, class_index_for, file_rows
from qatlab.data.layouts import open_layout
from qatlab.data.sets import ImageSet, Layout
from qatlab.data.transforms import Preprocess
from qatlab.errors import UserError, nearest


@dataclass(frozen=True)
class OpenedSet:
    """A set's images, the class list its labels were found in, and the rows of its reference that it scores on.

    ``rows`` is None where that is all of them.
    """

    images: ImageSet | EmbeddedSet
    classes: ClassList | None
    rows: list[int] | None


class SetFiles:
    """The sets of a suite as they lie on disk; what several of them share is looked at once."""

    def __init__(self, config: SuiteConfig) -> None:
        self.config = config
        self.root = Path(config.root or ".").expanduser()
        self._layouts: dict[tuple[Path, str, Path | None], Layout] = {}

    def tried(self, name: str) -> list[str]:
        """Return the places below the root where a set is looked for, in order; none for a rendered one."""
        entry = self.config.sets[name]
        paths = [entry.path] if isinstance(entry.path, str) else list(entry.path or [])
        if not paths or not all(isinstance(path, str) for path in paths):
            raise UserError(f"suite.sets.{name}.path={entry.path} names no place; expected a path, or a list of them.")
        return [] if is_rendered(entry) else paths

    def place(self, name: str) -> Path | None:
        """Return the first of them that is there."""
        places = [self.root / Path(path).expanduser() for path in self.tried(name)]
        return next((path for path in places if path.exists()), None)

    def missing(self) -> dict[str, str]:
        """Return {set: why} for the sets that are not there, and those measured against one that is not."""
        absent = {
            name: f"looked for {', '.join(self.tried(name))} below {self.root}"
            for name, entry in self.config.sets.items()
            if not is_rendered(entry) and self.place(name) is None
        }
        hanging = {name: reference_of(name, self.config) for name in self.config.sets if name not in absent}
        return absent | {
            name: f"its reference {reference} is not there"
            for name, reference in hanging.items()
            if reference in absent
        }

    def layout(self, name: str) -> Layout:
        """Return what lies at the set's place; raises UserError when nothing does, or when it cannot be read."""
        entry, path = self.config.sets[name], self.place(name)
        if path is None:
            tried = self.tried(name)
            more = f" (nor {', '.join(tried[1:])})" if tried[1:] else ""
            raise UserError(
                f"suite.sets.{name}: {tried[0]} is not there{more}; suite.root={self.config.root} and the sets' paths below "
                "it decide where images are read, and suite.skip_missing=true leaves it out."
            )
        if entry.role in SPURIOUS and (path / entry.role).is_dir():
            path = path / entry.role
        folder = self.root / Path(entry.folder).expanduser() if entry.folder else None
        known = (path, entry.layout, folder)
        if known not in self._layouts:
            self._layouts[known] = open_layout(*known)
        return self._layouts[known]

    def head(self, name: str, table: Sequence[str] | None) -> ClassList:
        """Return the classes of an id set: its class list, the suite's names, those beside it, or the text ``table``'s."""
        entry = self.config.sets[name]
        if (listed := self.listed(entry)) is not None:
            return listed
        names: Sequence[str] | None = suite_class_names(self.config)
        if names is None and is_rendered(entry):
            names = table if table is not None else CLASS_NAMES
        if names is None:
            names = self.layout(name).class_names or table
        if names is None:
            raise UserError(
                f"suite.sets.{name} names no classes: give suite.class_names, its class list (classes=), or "
                "model.text_features with the names beside it."
            )
        return named_classes(names)

    def listed(self, entry: SetConfig) -> ClassList | None:
        """Return the class list that a set names, None where it names a file or nothing."""
        if entry.classes is None or entry.classes in (known := class_list_names()):
            return load_class_list(entry.classes) if entry.classes else None
        if Path(entry.classes).suffix not in (".json", ".csv", ".txt"):
            raise UserError(
                f"classes={entry.classes} is no class list{nearest(entry.classes, known)} and no .json, .csv or .txt file; "
                f"the lists are {', '.join(known)}."
            )
        return None

    def open(self, name: str, head: ClassList, preprocess: Preprocess) -> OpenedSet:
        """Return a set's images, labelled by the rows of ``head``, its reference's classes."""
        entry = self.config.sets[name]
        if is_rendered(entry):
            for option, default in (("corruption", None), ("pick", "0::1"), ("exclude", []), ("classes", None)):
                if getattr(entry, option) != default:
                    raise UserError(f"suite.sets.{name}.{option} needs images on disk, and {entry.path} is rendered.")
            kind = str(entry.path).removeprefix(EMBEDDED)
            return OpenedSet(EmbeddedSet(kind, self.config.images, self.config.seed), head, None)
        layout, listed = self.layout(name), self.listed(entry)
        where = f"suite.sets.{name} ({layout.path})"
        keys = [key for key in dict.fromkeys(layout.keys) if key is not None and str(key) not in entry.exclude]
        labels: dict[Key, int | None] | None = None
        rows = None
        if entry.role not in LABELLED:
            if listed is not None:
                found = find_all(keys, listed, where, layout.class_names)
                labels = {key: None if label is None else -1 for key, label in found.items()}
        elif entry.classes is not None and listed is None:
            labels = self._rows_of_file(entry, layout, head, keys)
        elif listed is None and isinstance(layout, Folders) and head.bare:
            labels = dict(class_index_for(layout.path, head.names, None, entry.exclude).items())
        else:
            own = listed or head
            place = rows_in(own, head, f"suite.sets.{name}")
            found = find_all([*keys, *_known(layout.empty, own)], own, where, layout.class_names)
            labels = {key: None if label is None else place[label] for key, label in found.items()}
            if len(own) < len(head) and entry.role not in SPURIOUS:
                rows = sorted(place)
        keep = _side(layout, entry.role, listed) if entry.role in SPURIOUS else None
        corruption = _corruption(name, entry)
        images = ImageSet(layout, preprocess, labels, entry.pick, list(entry.exclude), keep, corruption)
        return OpenedSet(images, listed or (head if entry.role in LABELLED else None), rows)

    def _rows_of_file(
        self, entry: SetConfig, layout: Layout, head: ClassList, keys: Sequence[Key]
    ) -> dict[Key, int | None]:
        file = self.root / str(entry.classes)
        if isinstance(layout, Folders):
            return dict(class_index_for(layout.path, head.names, file, entry.exclude).items())
        rows = file_rows(file, head.names)
        if lost := [key for key in keys if key not in rows]:
            raise UserError(f"{file} has no class '{lost[0]}'{nearest(str(lost[0]), rows)}, which {layout.path} names.")
        return {key: rows[str(key)] for key in keys}


def choose_sets(config: SuiteConfig) -> tuple[list[str], SetFiles, dict[str, str]]:
    """Return the names of the sets to score, their files, and {set: why} of those that suite.skip_missing leaves out.

    Raises UserError for an empty suite, an unknown role or reference, and a set that is not there.
    """
    refuse_empty(config)
    files = SetFiles(config)
    missing = files.missing()
    names = [name for name in config.sets if name not in missing]
    if missing and not config.skip_missing:
        files.layout(next(iter(missing)))  # raises, naming it and where it was looked for
    if not any(config.sets[name].role == "id" for name in names):
        raise UserError(
            f"None of the suite's id sets is there, so nothing can be measured against one; suite.root={config.root} "
            "decides where they are looked for, suite.check=true lists the places."
        )
    return names, files, missing


def _corruption(name: str, entry: SetConfig) -> Corrupt | None:
    if entry.corruption is None:
        return None
    known = [option.name for option in fields(Corrupt)]
    for option in entry.corruption:
        if option not in known:
            raise UserError(
                f"suite.sets.{name}.corruption.{option} is not an option{nearest(option, known)}; there are {', '.join(known)}."
            )
    if lacking := {"name", "severity"} - {*entry.corruption}:
        raise UserError(f"suite.sets.{name}.corruption has no {' and no '.join(sorted(lacking))}; it needs both.")
    return Corrupt(**entry.corruption)


def _known(folders: Sequence[str], classes: ClassList) -> list[str]:
    """The empty folders that are called as one of the classes; others are no concern of the set."""
    found = []
    for folder in folders:
        try:
            classes.find(folder)
        except KeyError:
            continue
        found.append(folder)
    return found


def _side(layout: Layout, role: str, classes: ClassList | None) -> Callable[[int], bool] | None:
    """Whether an image shows its class before the background of ``role``: by the group's name, or by the class list."""
    if not any(layout.groups):
        return None
    backgrounds = classes.backgrounds.get(role) if classes is not None else None
    if backgrounds is None and not any(group.lower().startswith(role) for group in layout.groups):
        raise UserError(
            f"{layout.path}: no image's group is called {role} (found {', '.join(sorted({*layout.groups})[:5])}); give the "
            "set a class list that says which backgrounds are (classes=counteranimal)."
        )

    def keep(place: int) -> bool:
        group, key = layout.groups[place].lower(), layout.keys[place]
        if group.startswith(SPURIOUS):
            return group.startswith(role)
        if backgrounds is None or classes is None or key is None:
            return False
        label = classes.find(key)
        return label is not None and backgrounds[label] == group

    return keep
