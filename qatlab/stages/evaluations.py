"""The evaluations among the callbacks of a run, and the sets that still lack some of their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch

from qatlab.callbacks import OOD, Temperature
from qatlab.config import Config
from qatlab.config.blocks import build
from qatlab.config.named_files import of_files_in
from qatlab.evaluation.evaluation import Evaluation, Pass
from qatlab.evaluation.negatives import described
from qatlab.evaluation.score_inputs import ESTIMATED
from qatlab.results.run import Run
from qatlab.suites.source import Source, View
from qatlab.suites.suite import Suite


@dataclass(frozen=True)
class Evaluations:
    """The callbacks of a run, {name: object}, built from its options."""

    by_name: Mapping[str, Any]

    @classmethod
    def built(cls, config: Config) -> Evaluations:
        """Return the callbacks that the options ask for; a callback that is set to null is left out."""
        return cls({name: build(block) for name, block in config.callbacks.items() if block})

    @property
    def callbacks(self) -> list[L.Callback]:
        """Return the Lightning callbacks, which the trainer calls."""
        return [callback for callback in self.by_name.values() if isinstance(callback, L.Callback)]

    @property
    def fed(self) -> list[Evaluation]:
        """Return the evaluations, which are fed with predictions and give rows."""
        return [callback for callback in self.by_name.values() if isinstance(callback, Evaluation)]

    @property
    def scores(self) -> list[str]:
        """Return the names of the OOD scores that any callback asks for, each once."""
        asked: dict[str, None] = {}
        for callback in self.by_name.values():
            # The attribute decides and not the class, because a user's own callback may ask for scores too.
            asked |= dict.fromkeys(getattr(callback, "scores", ()))
        return list(asked)

    @property
    def mcm_temperature(self) -> float:
        """Return the temperature of the MCM score: the option of the OOD evaluation, or without one 1, as in MCM's code."""
        return next((c.mcm_temperature for c in self.by_name.values() if isinstance(c, OOD)), 1.0)

    @property
    def temperature(self) -> Temperature | None:
        """Return the callback that refits the logit scale, None without one."""
        return next((c for c in self.by_name.values() if isinstance(c, Temperature)), None)

    def missing(self, suite: Suite, views: Sequence[View], available: Mapping[str, frozenset[str]], run: Run) -> Suite:
        """Return ``suite`` reduced to the sets that lack at least one row of an evaluation under one of ``views``.

        ``available`` {ID reference: the inputs of OOD scores that can be computed} decides which rows are expected.
        """
        images = {entry.source: len(entry.images) for entry in suite.sets if entry.source.role != "calibration"}
        # The pass is only asked which rows it would give. No image goes through it, so that the device does not matter.
        asked = Pass(views, list(images), torch.device("cpu"), run.folder, available=available)
        stored: dict[tuple[View, Source], set[str]] = {}
        for view in views:
            done = run.done(view.stage)
            for source in images:
                stored[view, source] = done.get((source.name, view.definition(source)), set())
        lacking: set[Source] = set()
        for evaluation in self.fed:
            lacking |= {source for _, source in evaluation.lacking(asked, images, stored)}
        fitted = any(ESTIMATED & inputs for inputs in available.values())
        return suite.missing(lambda source: source not in lacking, fitted)


def scoring_options(config: Config) -> dict[str, Any]:
    """Return the options that scores depend on; the definition of a set is a hash of them and of its images."""
    # The refit of the temperature is left out: its rows have a view and a definition of their own, and it changes no
    # others.
    found: dict[str, Any] = {name: block for name, block in config.callbacks.items() if name != "temperature"}
    found |= {"resamples": config.suite.resamples, "negatives": described(config.suite.negatives)}
    found["precision"] = config.trainer.precision
    if (
        config.suite.zeroshot != "softmax"
    ):  # added only here, so that the rows of earlier releases keep their definitions
        found["zeroshot"] = config.suite.zeroshot
    # A file may change and keep its name, so the content of a file that a callback names is part of the definition.
    for file, sha256 in of_files_in(config.callbacks).items():
        found[f"content of {file}"] = sha256
    return found
