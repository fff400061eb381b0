"""A suite: image sets with a role each, the zero-shot heads they are scored with, and one loader per set."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qatlab.config import SuiteConfig
from qatlab.core.errors import UserError, nearest
from qatlab.core.hashing import digest
from qatlab.core.signals import leave_to_parent
from qatlab.data.images.classlists import ClassList
from qatlab.data.images.walk import LOSSES, told
from qatlab.models.clip import Clip
from qatlab.suites.heads import Head, head_for
from qatlab.suites.set_files import choose_sets
from qatlab.suites.set_options import SPURIOUS, for_tiny, is_rendered, reference_of
from qatlab.suites.source import Source

__all__ = ["EvaluationSet", "Indexed", "Suite", "build_suite"]


class Indexed(Dataset):  # type: ignore[type-arg]
    """A dataset of (image, label, position), made of one of (image, label); ``places`` restricts it to some images."""

    def __init__(self, images: Any, places: Sequence[int] | None = None) -> None:
        self.images = images
        self.places = range(len(images)) if places is None else places

    def __len__(self) -> int:
        return len(self.places)

    def __getitems__(self, positions: list[int]) -> list[tuple[Tensor, int, int]]:
        """Return the items (image (3, S, S) uint8, label, position) at several positions, read or drawn together."""
        # A DataLoader calls this in place of __getitem__, so that a rendered set can draw a whole batch at once.
        places = [self.places[position] for position in positions]
        batched = getattr(self.images, "__getitems__", None)
        items = batched(places) if batched else [self.images[place] for place in places]
        return [(image, label, position) for (image, label), position in zip(items, positions, strict=True)]


@dataclass(frozen=True)
class EvaluationSet:
    """One set of a suite: its ``source``, which its rows name, and its images.

    Labels are rows of the reference's head. A set may show only some classes of its reference (ImageNet-R: 200 of
    1000); then ``rows`` are the rows of these classes, on which accuracy and calibration are measured, else None.
    """

    source: Source
    images: Indexed
    rendered: bool  # a rendered set is loaded without loader processes, which cost more than they save
    rows: list[int] | None = None

    @property
    def labels(self) -> Tensor:
        """Return the label of each image, (n,) int64, -1 for an image without one."""
        every = self.images.images.labels
        return torch.tensor([every[place] for place in self.images.places], dtype=torch.int64)


@dataclass(frozen=True)
class Suite:
    """The sets in the order they are scored, and a zero-shot head per ID reference.

    ``ood_heads`` are heads only for OOD scores, for references that have other prompts for these scores; their classes
    are the same, in the same order. ``skipped`` {set: reason} are missing sets that were left out. ``left_out`` {set:
    text} tells which files in a set's folder were not read and may have been meant as images of the set.
    """

    sets: list[EvaluationSet]
    heads: dict[str, Head]
    ood_heads: dict[str, Head] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> EvaluationSet:
        """Return the set of a name; raises UserError for a name that the suite does not have."""
        for entry in self.sets:
            if entry.source.name == name:
                return entry
        known = [entry.source.name for entry in self.sets]
        raise UserError(f"the suite has no set '{name}'{nearest(name, known)}; there are {', '.join(known)}.")

    @property
    def images(self) -> int:
        """Return the sum of the sizes of the sets; an image that two sets share counts twice."""
        return sum(len(entry.images) for entry in self.sets)

    def only(self, *, roles: set[str] | None = None, names: set[str] | None = None) -> Suite:
        """Return the suite reduced to the sets of some roles or names; None allows all."""
        sets = [
            s
            for s in self.sets
            if (roles is None or s.source.role in roles) and (names is None or s.source.name in names)
        ]
        return replace(self, sets=sets)

    def probe(self, names: list[str] | None, images: int) -> Suite:
        """Return the small suite of a probe: at most ``images`` images of each of the sets ``names`` and of their references.

        By default it has all sets, but never calibration sets. Raises UserError for a name of no scored set.
        """
        scored = [entry for entry in self.sets if entry.source.role != "calibration"]
        for name in names or []:
            if name in self.skipped:  # no error, because suite.skip_missing=true allows the set to be missing
                continue
            if name not in (known := [entry.source.name for entry in scored]):
                raise UserError(
                    f"suite.probe_sets names {name!r}, which is no scored set of the suite{nearest(name, known)}."
                )
        chosen = [entry for entry in scored if names is None or entry.source.name in names]
        # OOD scores compare a set with its reference, so the references of the chosen sets are added.
        wanted = {entry.source.reference for entry in chosen} | {entry.source.name for entry in chosen}
        thin = [
            replace(entry, images=Indexed(entry.images.images, _draw(len(entry.images), images)))
            for entry in scored
            if entry.source.name in wanted
        ]
        return replace(self, sets=thin)

    @property
    def calibration(self) -> Suite:
        """Return the suite of the calibration sets that have the same reference as the first of them."""
        # One logit scale is fitted on the logits of one head, and images of another reference have other classes.
        split = self.only(roles={"calibration"}).sets
        return replace(self, sets=[s for s in split if s.source.reference == split[0].source.reference])

    def missing(self, done: Callable[[Source], bool], fitted: bool = False) -> Suite:
        """Return the suite of the sets that are not ``done``, and of the sets that their scores need.

        Needed are their ID references, the other side of a spurious-cue pair and, for scores with parameters ``fitted``
        on images, the calibration sets.
        """
        todo = [s.source for s in self.sets if s.source.role != "calibration" and not done(s.source)]
        references = {source.reference for source in todo}
        beside = {*(SPURIOUS if any(s.role in SPURIOUS for s in todo) else ()), *(["calibration"] if fitted else [])}
        wanted = {source.name for source in todo} | references
        wanted |= {s.source.name for s in self.sets if s.source.role in beside and s.source.reference in references}
        return self.only(names=wanted)

    def loaders(self, batch_size: int, workers: int, rank: int = 0, world: int = 1) -> list[DataLoader[Any]]:
        """Return one loader per set; rank r of w loads the images r, r + w, ..., so that each is loaded exactly once."""
        # No DistributedSampler is used, because it repeats images so that all processes have the same number of them.
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
    """Return the suite that ``config`` describes, with its sets opened and its class prompts encoded.

    ``evaluations`` are the options of the callbacks that score the suite; they are a part of each set's definition.
    With ``cache_text`` the text features are kept on disk. Raises UserError for a missing root or set (unless
    suite.skip_missing), an unknown role or reference, a suite without an id set, a suite with the same images twice in
    the same role, and classes that do not fit.
    """
    names, files, skipped = choose_sets(config)
    # Rendered images have 64 pixels, as the tiny model takes them, and are never resized for another model.
    if clip.facts["model"] != "tiny" and any(is_rendered(entry) for entry in config.sets.values()):
        raise UserError(for_tiny(clip.facts["model"]))
    references = {name: reference_of(name, config) for name in names}
    table = clip.text_table.names if clip.text_table is not None else None
    # The class lists of id sets come first, because the labels of the other sets are looked up in them.
    lists = {name: files.head(name, table) for name in names if references[name] == name}
    opened = {name: files.open(name, lists[references[name]], clip.preprocess) for name in names}
    heads = {name: head_for(name, lists[name], files, clip, cache_text) for name in lists}
    # A set may have other prompts for OOD scores: papers on OOD detection use one template, and accuracy is often
    # measured with 80.
    ood_heads = {
        name: head_for(name, lists[name], files, clip, cache_text, "ood_prompts")
        for name in lists
        if config.sets[name].ood_prompts is not None
    }
    prints = {name: entry.images.fingerprint() for name, entry in opened.items()}
    _refuse_twins(config, references, prints, lists)
    sets = []
    for name in names:
        role, reference = config.sets[name].role, references[name]
        texts = [part[reference].described() for part in (heads, ood_heads) if reference in part]
        # The definition covers everything that decides a set's numbers apart from the model. If it changes, rows are
        # made again.
        definition = _hash(role, prints[name], prints[reference], texts, opened[name].rows, evaluations)
        source = Source(name, role, reference, definition)
        entry = opened[name]
        sets.append(EvaluationSet(source, Indexed(entry.images), is_rendered(config.sets[name]), entry.rows))
    layouts = {name: files.layout(name) for name in names if not is_rendered(config.sets[name])}
    left_out = {}
    for name, layout in layouts.items():
        # Only the reasons in LOSSES are told: a README beside the images is no loss, a picture in a format that cannot
        # be read is a loss.
        if said := told(layout.left_out, LOSSES):
            left_out[name] = said
    return Suite(sets, heads, ood_heads, skipped, left_out)


def _refuse_twins(
    config: SuiteConfig, references: dict[str, str], prints: dict[str, str], lists: dict[str, ClassList]
) -> None:
    """Raise UserError where two sets are the same images, labels and role against the same reference."""
    seen: dict[tuple[Any, ...], str] = {}
    for name, reference in references.items():
        entry = config.sets[name]
        # Two id sets may have the same images if their heads differ, for example ImageNet with two lists of class
        # names.
        against = (*lists[name].names, entry.prompts) if reference == name else reference
        if (twin := seen.setdefault((prints[name], entry.role, against), name)) != name:
            raise UserError(
                f"suite.sets.{twin} and suite.sets.{name} are the same images in the same role ({entry.role}): remove one, "
                "or give it another pick, role or reference."
            )


def _draw(n: int, k: int) -> list[int]:
    """Return the sorted places of at most ``k`` of ``n`` images; the same ``n`` and ``k`` always give the same places."""
    # The places are drawn at random. In a set whose classes take turns, every (n / k)-th image could miss some classes.
    return sorted(np.random.default_rng(0).permutation(n)[:k].tolist())


def _hash(*parts: Any) -> str:
    return digest(json.dumps(parts, sort_keys=True))[:8]
