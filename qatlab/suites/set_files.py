"""The sets of a suite on disk: the paths of each set, its layout and its classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from qatlab.config import EMBEDDED, SetConfig, SuiteConfig
from qatlab.config.blocks import imported
from qatlab.config.trust import is_own_layout
from qatlab.core.errors import UserError, nearest
from qatlab.core.files import user_path
from qatlab.data.corruptions import Corrupt
from qatlab.data.embedded.sets import CLASS_NAMES, EmbeddedSet
from qatlab.data.images.classlists import (
    ClassList,
    Key,
    class_list_names,
    load_class_list,
    named_classes,
    restricted,
    rows_in,
)
from qatlab.data.images.folders import Folders, class_index_for, file_rows
from qatlab.data.images.imageset import ImageSet, Layout
from qatlab.data.images.labels import find_labels, kept_by_path
from qatlab.data.images.layouts import open_layout
from qatlab.data.images.names import read_names
from qatlab.data.preprocess import Preprocess
from qatlab.suites.folder_names import ALL, FOLDERS, class_folders, named_by_folders, refuse_few
from qatlab.suites.set_options import LABELLED, SPURIOUS, is_rendered, reference_of, refuse_empty


@dataclass(frozen=True)
class OpenedSet:
    """A set's images, the class list that its labels were found in, and the rows of its reference that it is scored on.

    ``rows`` is None for a set that is scored on all rows.
    """

    images: ImageSet | EmbeddedSet
    classes: ClassList | None
    rows: list[int] | None


class SetFiles:
    """The sets of a suite on disk; a folder that several sets share is read once."""

    def __init__(self, config: SuiteConfig) -> None:
        self.config = config
        self.root = user_path(config.root or ".")
        # Layouts are kept, because a folder of a million images is slow to list, and an ID set and its calibration set
        # are often picks of the same folder.
        self._layouts: dict[tuple[Path, str | type[Layout], Path | None, bool], Layout] = {}

    def tried(self, name: str) -> list[str]:
        """Return the paths below the root where a set is looked for, in order; [] for a rendered set."""
        entry = self.config.sets[name]
        paths = [entry.path] if isinstance(entry.path, str) else list(entry.path or [])
        if not paths or not all(isinstance(path, str) for path in paths):
            raise UserError(f"suite.sets.{name}.path={entry.path} names no place; expected a path, or a list of them.")
        return [] if is_rendered(entry) else paths

    def place(self, name: str) -> Path | None:
        """Return the first existing path of those where a set is looked for; None where none exists."""
        places = [self.root / user_path(path) for path in self.tried(name)]
        return next((path for path in places if path.exists()), None)

    def missing(self) -> dict[str, str]:
        """Return {set: reason} of the sets that do not exist, and of the sets whose reference does not exist."""
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
        """Return the layout of a set; raises UserError for a set that does not exist or cannot be read."""
        entry, path = self.config.sets[name], self.place(name)
        if path is None:
            tried = self.tried(name)
            more = f" (nor {', '.join(tried[1:])})" if tried[1:] else ""
            raise UserError(
                f"suite.sets.{name}: {tried[0]} is not there{more}; suite.root={self.config.root} and the sets' paths below "
                "it decide where images are read, and suite.skip_missing=true leaves it out."
            )
        # CounterAnimal may have the folders common/<class>/... and counter/<class>/...: then the two sets have the same
        # path, and each reads one of the two folders.
        if entry.role in SPURIOUS and (path / entry.role).is_dir():
            path = path / entry.role
        folder = self.root / user_path(entry.folder) if entry.folder else None
        kind = own_layout(name, entry) if is_own_layout(entry) else entry.layout
        known = (path, kind, folder, entry.outside)
        if known not in self._layouts:
            self._layouts[known] = open_layout(*known)
        return self._layouts[known]

    def head(self, name: str, table: Sequence[str] | None) -> ClassList:
        """Return the classes of an id set, from the first of these sources that has any.

        The sources are the set's class list, the suite's class names, the names that come with the dataset, the names
        of the text ``table``, and the names of the set's folders. A set's own class_names choose a part of these
        classes, or are a new list. Raises UserError where no source has any.
        """
        entry = self.config.sets[name]
        # The sources are ordered from the most to the least specific. For a set on disk the text table comes late,
        # because it belongs to the model and may hold the classes of several sets.
        whole = self.listed(entry)
        if whole is None:
            names: Sequence[str] | None = read_names(self.config.class_names, "suite.class_names", self.root)
            if names is None and is_rendered(entry):
                names = table if table is not None else CLASS_NAMES
            if names is None:
                names = self.layout(name).class_names or table
            whole = named_classes(names) if names else None
            # With class_names of its own, or a file that maps its folders, a set says itself which classes count.
            if entry.class_names is None and entry.classes is None and not is_rendered(entry):
                if whole is None:
                    whole = named_by_folders(name, self.layout(name), entry.exclude)
                refuse_few(name, class_folders(self.layout(name), entry.exclude), whole)
        classes = self._restricted(name, whole)
        if classes is None:
            raise UserError(
                f"suite.sets.{name} names no classes: give suite.class_names, its class list (classes=), or "
                "model.text_features with the names beside it."
            )
        return classes

    def listed(self, entry: SetConfig) -> ClassList | None:
        """Return the packaged class list that a set's option ``classes`` names; None for a file, and without the option."""
        if entry.classes is None or entry.classes in (known := class_list_names()):
            return load_class_list(entry.classes) if entry.classes else None
        if Path(entry.classes).suffix not in (".json", ".csv", ".txt"):
            raise UserError(
                f"classes={entry.classes} is no class list{nearest(entry.classes, known)} and no .json, .csv or .txt file; "
                f"the lists are {', '.join(known)}."
            )
        return None

    def open(self, name: str, head: ClassList, preprocess: Preprocess) -> OpenedSet:
        """Return an opened set; its labels are rows of ``head``, the classes of its reference."""
        entry = self.config.sets[name]
        if is_rendered(entry):
            return OpenedSet(self._rendered(name, head), head, None)
        layout, own = self.layout(name), self._own(name, head)
        # There are three kinds of sets: OOD sets, whose class list only says which images to keep; sets with a file
        # that maps folders to classes of the reference; and sets whose labels are found in a class list.
        where = f"suite.sets.{name} ({layout.source})"
        labels: dict[Key, int | None] | None = None
        found: dict[Key, int | None] = {}
        rows, keep = None, None
        if entry.role not in LABELLED:
            if own is not None and -1 in layout.keys:  # an imglist of OpenOOD, where -1 stands for "no class"
                keep = kept_by_path(layout, own, where)
            elif own is not None:
                found = find_labels(layout, own, where, entry.exclude, entry.numbers)
                # None marks the images of classes that class_names leaves out: they are not used. All others get -1, no
                # label.
                labels = {key: None if label is None else -1 for key, label in found.items()}
        elif entry.classes is not None and self.listed(entry) is None:
            labels = self._rows_of_file(entry, layout, head)
        else:
            own = own or head
            place = rows_in(own, head, f"suite.sets.{name}")
            found = find_labels(layout, own, where, entry.exclude, entry.numbers)
            labels = {key: None if label is None else place[label] for key, label in found.items()}
            # ImageNet-R shows 200 of ImageNet's 1000 classes, and its accuracy is measured on the logits of these 200.
            # The two sides of a spurious cue also show only some classes, but are scored among all (CounterAnimal's
            # 1-vs-1000).
            if len(own) < len(head) and entry.role not in SPURIOUS:
                rows = sorted(place)
        if entry.role in SPURIOUS:
            keep = _side(layout, entry.role, own, found)
        corruption = _corruption(name, entry)
        images = ImageSet(layout, preprocess, labels, entry.pick, list(entry.exclude), keep, corruption)
        return OpenedSet(images, own or (head if entry.role in LABELLED else None), rows)

    def _own(self, name: str, head: ClassList) -> ClassList | None:
        """Return the class list that a set has for itself, None where it names none; for an id set this is ``head``."""
        entry = self.config.sets[name]
        if entry.role == "id":
            return head
        listed = self.listed(entry)
        if entry.role not in LABELLED and entry.classes is not None and listed is None:
            raise UserError(
                f"suite.sets.{name}.classes={entry.classes} maps folders to the reference's classes, of which a set with role "
                f"{entry.role} shows none; say which of its classes to keep with class_names, or leave it out."
            )
        return listed if entry.class_names is None else self._restricted(name, listed or head.whole)

    def _restricted(self, name: str, whole: ClassList | None) -> ClassList | None:
        """Return the class list of a set's option class_names: a part of ``whole`` if that has all names, else a new list.

        Without the option, and for the word "all", the list is ``whole``.
        """
        entry, key = self.config.sets[name], f"suite.sets.{name}.class_names"
        if entry.class_names == ALL:
            return whole
        if entry.class_names == FOLDERS and not is_rendered(entry):
            names: list[str] | None = named_by_folders(name, self.layout(name), entry.exclude).names
        else:
            names = read_names(entry.class_names, key, self.root)
        if names is None:
            return whole
        # Where the set names a class list too, the names must be in this list: ``restricted`` reports a name that is
        # not.
        if whole is None or (self.listed(entry) is None and any(whole.own(text) is None for text in names)):
            return named_classes(names)
        return restricted(whole, names, key)

    def _rendered(self, name: str, head: ClassList) -> EmbeddedSet:
        """Return the rendered set ``name``; its labels are rows of ``head``."""
        entry = self.config.sets[name]
        # These options are refused, because a rendered set has no files and would ignore them silently.
        for option in ("corruption", "pick", "exclude", "classes", "class_names", "numbers"):
            if getattr(entry, option) != getattr(SetConfig(), option):
                raise UserError(f"suite.sets.{name}.{option} needs images on disk, and {entry.path} is rendered.")
        kind = str(entry.path).removeprefix(EMBEDDED)
        known = [head.own(text) for text in CLASS_NAMES]
        rows = [row for row in known if row is not None]
        # A user may choose other words for the classes of the world. The order then says which class is meant, provided
        # that there are as many words as classes and that no original name is in another row.
        if len(head) == len(known) and all(row in (None, label) for label, row in enumerate(known)):
            rows = list(range(len(known)))
        images = EmbeddedSet(kind, self.config.images, self.config.seed, rows)
        if entry.role in LABELLED and images.classes and len(rows) < len(CLASS_NAMES):
            raise UserError(
                f"suite.sets.{name}: {entry.path} shows the class '{CLASS_NAMES[known.index(None)]}', which its reference's "
                f"{len(head)} classes lack ({head.name}); leave suite.class_names out, or name all {len(CLASS_NAMES)}."
            )
        return images

    def _rows_of_file(self, entry: SetConfig, layout: Layout, head: ClassList) -> dict[Key, int | None]:
        """Return {key: label, None for a class that is left out} from a file that maps class folders to class names.

        The file may name all classes, including those that the set's option class_names leaves out.
        """
        file = self.root / user_path(str(entry.classes))
        whole = head.whole if head.whole.bare else head
        if isinstance(layout, Folders):
            rows = class_index_for(layout.path, whole.names, file, entry.exclude)
        else:
            rows = file_rows(file, whole.names)
        keys = [key for key in dict.fromkeys(layout.keys) if key is not None and str(key) not in entry.exclude]
        if lost := [key for key in keys if str(key) not in rows]:
            raise UserError(f"{file} has no class '{lost[0]}'{nearest(str(lost[0]), rows)}, which {layout.path} names.")
        # The file gives rows of ``whole``. Where the head is a part of this list, they are changed to rows of the head.
        return {
            key: head.label(rows[str(key)]) if whole is head.whole else rows[str(key)]
            for key in [*keys, *layout.empty]
            if str(key) in rows
        }


def choose_sets(config: SuiteConfig) -> tuple[list[str], SetFiles, dict[str, str]]:
    """Return (names of the sets to score, their files, {set: reason} of the sets that suite.skip_missing leaves out).

    Raises UserError for an empty suite, an unknown role or reference, and without suite.skip_missing for a missing set.
    """
    refuse_empty(config)
    files = SetFiles(config)
    missing = files.missing()
    names = [name for name in config.sets if name not in missing]
    # By default one missing set ends the run here, before hours are spent on results without it.
    if missing and not config.skip_missing:
        files.layout(next(iter(missing)))  # raises the error that names the set and its places
    if not any(config.sets[name].role == "id" for name in names):
        raise UserError(
            f"None of the suite's id sets is there, so nothing can be measured against one; suite.root={config.root} "
            "decides where they are looked for, suite.check=true lists the places."
        )
    return names, files, missing


def _corruption(name: str, entry: SetConfig) -> Corrupt | None:
    """Return the corruption of a set's images, None without one; raises UserError for an unknown or a missing option."""
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


def own_layout(name: str, entry: SetConfig) -> type[Layout]:
    """Return the user's own class that reads the set ``name``; raises UserError for a class that is no layout."""
    key = f"suite.sets.{name}.layout"
    found = imported(key, entry.layout)
    if not (isinstance(found, type) and issubclass(found, Layout) and isinstance(getattr(found, "kind", None), str)):
        raise UserError(
            f"{key}={entry.layout} is no layout: expected a subclass of qatlab.data.Layout with a kind, a word."
        )
    return found


def _side(
    layout: Layout, role: str, classes: ClassList | None, labels: Mapping[Key, int | None]
) -> Callable[[int], bool] | None:
    """Return a function from an image's place to whether the image belongs to the side ``role`` of a spurious cue.

    The name of the image's group decides, or the usual backgrounds in the class list. None for a layout without groups,
    because all its images are of one side. Raises UserError where neither the groups nor the class list name the side.
    """
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
        # A group name that begins with "common" or "counter" names the side. The name of a background needs the class
        # list: snow is the usual background of one animal and an unusual one of another.
        if group.startswith(SPURIOUS):
            return group.startswith(role)
        if backgrounds is None or key is None:
            return False
        label = labels.get(key)
        return label is not None and backgrounds[label] == group

    return keep
