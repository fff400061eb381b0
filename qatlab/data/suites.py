"""A suite: image sets with a role each, the zero-shot heads they are scored with, and one loader per set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qatlab.clip import Clip
from qatlab.config import SetConfig, SuiteConfig
from qatlab.data.embedded import CLASS_NAMES, EmbeddedSet
from qatlab.data.images import ImageFolderSet, class_index_for
from qatlab.errors import UserError, nearest
from qatlab.evaluation import Source
from qatlab.stopping import leave_to_parent
from qatlab.zeroshot import Classes, class_features

ROLES = ("id", "shifted", "near_ood", "far_ood", "calibration")
_EMBEDDED = "embedded:"


class Indexed(Dataset):  # type: ignore[type-arg]
    """A set whose items (image, label) get their position; ``places`` restricts it to some of its images."""

    def __init__(self, images: Any, places: Sequence[int] | None = None) -> None:
        self.images = images
        self.places = range(len(images)) if places is None else places

    def __len__(self) -> int:
        return len(self.places)

    def __getitems__(self, positions: list[int]) -> list[tuple[Tensor, int, int]]:
        """Return several items; a DataLoader calls this, and a rendered set draws them together."""
        places = [self.places[position] for position in positions]
        batched = getattr(self.images, "__getitems__", None)
        items = batched(places) if batched else [self.images[place] for place in places]
        return [(image, label, position) for (image, label), position in zip(items, positions, strict=True)]


@dataclass(frozen=True)
class EvaluationSet:
    """One set of a suite: where its rows say they come from, and its images."""

    source: Source
    images: Indexed
    rendered: bool  # made on the spot: cheaper without loader processes


@dataclass(frozen=True)
class Suite:
    """The sets in the order they are scored, and a zero-shot head per ID reference."""

    sets: list[EvaluationSet]
    classes: dict[str, Classes]

    @property
    def images(self) -> int:
        """Return how many images a pass embeds."""
        return sum(len(entry.images) for entry in self.sets)

    def only(self, *, roles: set[str] | None = None, names: set[str] | None = None) -> Suite:
        """Return the suite restricted to some roles or names."""
        sets = [
            s
            for s in self.sets
            if (roles is None or s.source.role in roles) and (names is None or s.source.name in names)
        ]
        return replace(self, sets=sets)

    def probe(self, names: list[str] | None, images: int) -> Suite:
        """Return the small suite of a probe: at most ``images`` of some sets each, never those of the calibration split."""
        scored = [entry for entry in self.sets if entry.source.role != "calibration"]
        for name in names or []:
            if name not in (known := [entry.source.name for entry in scored]):
                raise UserError(
                    f"suite.probe_sets names {name!r}, which is no scored set of the suite{nearest(name, known)}."
                )
        chosen = [entry for entry in scored if names is None or entry.source.name in names]
        # A set without its reference has no scores: references come along.
        wanted = {entry.source.reference for entry in chosen} | {entry.source.name for entry in chosen}
        thin = [
            replace(entry, images=Indexed(entry.images.images, _draw(len(entry.images), images)))
            for entry in scored
            if entry.source.name in wanted
        ]
        return replace(self, sets=thin)

    def missing(self, done: Callable[[Source], bool], roles: set[str]) -> Suite:
        """Return the suite of the sets of some ``roles`` that are not ``done``, with the ID references they need."""
        todo = [s for s in self.sets if s.source.role in roles and not done(s.source)]
        wanted = {s.source.name for s in todo} | {s.source.reference for s in todo}
        return self.only(names=wanted)

    def loaders(self, batch_size: int, workers: int, rank: int = 0, world: int = 1) -> list[DataLoader[Any]]:
        """Return one loader per set; rank r of w takes images r, r + w, ...: each exactly once, none padded."""
        return [
            DataLoader(
                entry.images,
                batch_size=batch_size,
                sampler=range(rank, len(entry.images), world),
                num_workers=0 if entry.rendered else workers,
                worker_init_fn=leave_to_parent,
            )
            for entry in self.sets
        ]


def build_suite(config: SuiteConfig, clip: Clip, evaluations: Any = None, cache_text: bool = True) -> Suite:
    """Return the suite that ``config`` describes, its folders opened and its class prompts encoded.

    ``evaluations`` is what scores it, as options: part of each set's definition.

    Raises UserError for a missing root or folder, an unknown role or reference, a suite without an id set, and classes
    that do not fit.
    """
    if not config.sets:
        raise UserError(
            "suite.sets is empty: suite=folders needs sets, each with a path, a role and a reference (README shows one)."
        )
    default = next((name for name, entry in config.sets.items() if entry.role == "id"), None)
    if default is None:
        raise UserError(
            f"no set of the suite has role: id (found {', '.join(f'{n}: {s.role}' for n, s in config.sets.items())})."
        )
    rendered = all(entry.path.startswith(_EMBEDDED) for entry in config.sets.values())
    names = _class_names(config) or (None if clip.text_table is not None or not rendered else CLASS_NAMES)
    classes = class_features(clip, names, config.templates, cache_text)
    references = {name: _reference(name, entry, default, config) for name, entry in config.sets.items()}
    opened = {name: _open(entry, config, clip, classes) for name, entry in config.sets.items()}
    prints = {name: images.fingerprint() for name, images in opened.items()}
    texts = [classes.names, config.templates if clip.text_table is None else classes.prompts]
    sets = []
    for name, entry in config.sets.items():
        reference = references[name]
        definition = _hash(entry.role, prints[name], prints[reference], texts, evaluations)
        source = Source(name, entry.role, reference, definition)
        sets.append(EvaluationSet(source, Indexed(opened[name]), entry.path.startswith(_EMBEDDED)))
    heads = {entry.source.reference: classes for entry in sets}
    return Suite(sets, heads)


def _reference(name: str, entry: SetConfig, default: str, config: SuiteConfig) -> str:
    """Return the name of the ID set that a set is measured against; raises UserError for an unknown role or reference."""
    if entry.role not in ROLES:
        raise UserError(
            f"suite.sets.{name}.role={entry.role} is unknown{nearest(entry.role, ROLES)}; there are {', '.join(ROLES)}."
        )
    reference = name if entry.role == "id" else entry.reference or default
    if reference not in config.sets or config.sets[reference].role != "id":
        raise UserError(
            f"suite.sets.{name}.reference={reference} is no id set of the suite{nearest(reference, config.sets)}."
        )
    return reference


def _draw(n: int, k: int) -> list[int]:
    # Not every n / k-th: where classes take turns, that would be some of the classes only.
    return sorted(np.random.default_rng(0).permutation(n)[:k].tolist())


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def _class_names(config: SuiteConfig) -> list[str] | None:
    """Return suite.class_names, read from its file where it is one; raises UserError when that is missing or holds none."""
    if not isinstance(config.class_names, str):
        return config.class_names
    path = Path(config.root or ".").expanduser() / config.class_names
    if not path.is_file():
        raise UserError(
            f"suite.class_names={config.class_names}: there is no file {path}; give a .txt, a .json or a list."
        )
    if path.suffix == ".txt":
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    records = json.loads(path.read_text())
    if isinstance(records, list) and all(
        isinstance(record, dict) and {"index", "name"} <= set(record) for record in records
    ):
        return [record["name"] for record in sorted(records, key=lambda record: record["index"])]
    if isinstance(records, list) and all(isinstance(record, str) for record in records):
        return records
    raise UserError(f"{path} is no list of names, nor of records with index and name.")


def _open(entry: SetConfig, config: SuiteConfig, clip: Clip, classes: Classes) -> EmbeddedSet | ImageFolderSet:
    if entry.path.startswith(_EMBEDDED):
        return EmbeddedSet(entry.path.removeprefix(_EMBEDDED), config.images, config.seed)
    root = Path(config.root or ".").expanduser()
    path = root / entry.path
    if not path.is_dir():
        raise UserError(
            f"{path} is not there; suite.root={config.root} and the sets' paths below it decide where images are read."
        )
    index = None
    if entry.role in ("id", "shifted", "calibration"):
        file = root / entry.classes if entry.classes else None
        index = class_index_for(path, classes.names, file, entry.exclude)
    return ImageFolderSet(path, clip.preprocess, index, entry.pick, list(entry.exclude))
