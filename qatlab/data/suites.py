"""A suite: image sets with a role each, the zero-shot heads they are scored with, and one loader per set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qatlab.clip import Clip
from qatlab.config import SuiteConfig
from qatlab.data.classlists import ClassList
from qatlab.data.entries import ROLES, SPURIOUS, is_rendered, reference_of
from qatlab.data.heads import Head, head_for
from qatlab.data.opening import choose_sets
from qatlab.errors import UserError, nearest
from qatlab.evaluation import Prediction, Source, View
from qatlab.stopping import leave_to_parent

__all__ = ["ROLES", "EvaluationSet", "Indexed", "Suite", "build_suite"]


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
    """One set of a suite: where its rows say they come from, and its images.

    Labels are rows of its reference's head; ``rows`` are those that accuracy and calibration are to be measured on, for
    a set of some of its classes only (ImageNet-R: 200 of 1000), else None.
    """

    source: Source
    images: Indexed
    rendered: bool  # made on the spot: cheaper without loader processes
    rows: list[int] | None = None

    @property
    def labels(self) -> Tensor:
        """Return the label of each image, (n,) int64, -1 where it has none."""
        every = self.images.images.labels
        return torch.tensor([every[place] for place in self.images.places], dtype=torch.int64)


@dataclass(frozen=True)
class Suite:
    """The sets in the order they are scored, and a zero-shot head per ID reference.

    ``ood_heads`` are those of the OOD scores, of the same classes in the same order, where they have prompts of their
    own. ``skipped`` {set: why} are those left out because they are not there.
    """

    sets: list[EvaluationSet]
    heads: dict[str, Head]
    ood_heads: dict[str, Head] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

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
            if name in self.skipped:
                continue
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

    @property
    def calibration(self) -> Suite:
        """Return the suite of the calibration sets that share the first one's reference."""
        split = self.only(roles={"calibration"}).sets
        return replace(self, sets=[s for s in split if s.source.reference == split[0].source.reference])

    def missing(self, done: Callable[[Source], bool], roles: set[str], fitted: bool = False) -> Suite:
        """Return the suite of the sets of some ``roles`` that are not ``done``, with those that they are measured with.

        These are their ID references, the other sides of spurious-cue pairs and, for ``fitted`` scores, the
        calibration sets.
        """
        todo = [s.source for s in self.sets if s.source.role in roles and not done(s.source)]
        references = {source.reference for source in todo}
        beside = {*(SPURIOUS if any(s.role in SPURIOUS for s in todo) else ()), *(["calibration"] if fitted else [])}
        wanted = {source.name for source in todo} | references
        wanted |= {s.source.name for s in self.sets if s.source.role in beside and s.source.reference in references}
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


def predicted(
    entry: EvaluationSet,
    features: Tensor,
    labels: Tensor,
    index: Tensor,
    views: Sequence[View],
    heads: Mapping[str, Head],
    ood_heads: Mapping[str, Head],
    **inputs: Any,
) -> Prediction:
    """Return the Prediction of a batch of a set from its unit ``features`` (B, D) and the zero-shot heads."""
    reference = entry.source.reference
    cosines = {
        name: features @ of[reference].classes.features.to(features.device).T
        for name, of in (("cosines", heads), ("ood_cosines", ood_heads))
        if reference in of
    }
    return Prediction(
        entry.source, features, labels=labels, index=index, views=views, rows=entry.rows, inputs=inputs, **cosines
    )


def build_suite(config: SuiteConfig, clip: Clip, evaluations: Any = None, cache_text: bool = True) -> Suite:
    """Return the suite that ``config`` describes, its sets opened and its class prompts encoded.

    ``evaluations`` is what scores it, as options: part of each set's definition.

    Raises UserError for a missing root or set (unless suite.skip_missing), an unknown role or reference, a suite
    without an id set, one that names the same images twice in the same role, and classes that do not fit.
    """
    names, files, skipped = choose_sets(config)
    references = {name: reference_of(name, config) for name in names}
    table = clip.text_table.names if clip.text_table is not None else None
    lists = {name: files.head(name, table) for name in names if references[name] == name}
    opened = {name: files.open(name, lists[references[name]], clip.preprocess) for name in names}
    heads = {name: head_for(name, lists[name], files, clip, cache_text) for name in lists}
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
        definition = _hash(role, prints[name], prints[reference], texts, opened[name].rows, evaluations)
        source = Source(name, role, reference, definition)
        entry = opened[name]
        sets.append(EvaluationSet(source, Indexed(entry.images), is_rendered(config.sets[name]), entry.rows))
    return Suite(sets, heads, ood_heads, skipped)


def _refuse_twins(
    config: SuiteConfig, references: dict[str, str], prints: dict[str, str], lists: dict[str, ClassList]
) -> None:
    """Raise UserError where two sets are the same images, labels and role against the same reference."""
    seen: dict[tuple[Any, ...], str] = {}
    for name, reference in references.items():
        entry = config.sets[name]
        against = (*lists[name].names, entry.prompts) if reference == name else reference
        if (twin := seen.setdefault((prints[name], entry.role, against), name)) != name:
            raise UserError(
                f"suite.sets.{twin} and suite.sets.{name} are the same images in the same role ({entry.role}): remove one, "
                "or give it another pick, role or reference."
            )


def _draw(n: int, k: int) -> list[int]:
    # Not every n / k-th: where classes take turns, that would be some of the classes only.
    return sorted(np.random.default_rng(0).permutation(n)[:k].tolist())


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
