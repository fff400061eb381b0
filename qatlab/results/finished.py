"""A run on disk, opened for reading: it needs no lock, and no torch until an encoder is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from qatlab.config import Config, load
from qatlab.core.checksums import read_table
from qatlab.core.errors import UserError, nearest
from qatlab.core.files import user_path
from qatlab.results.curves import read_curves
from qatlab.results.identity import stored_id
from qatlab.results.latest import latest
from qatlab.results.rowfile import Row
from qatlab.results.rows import frame, newest, read_rows
from qatlab.results.stages import ADAPTED, FP32, QUANTIZED, TRAINED

if TYPE_CHECKING:
    from torch import nn


class FinishedRun:
    """The folder of a run, opened only for reading; nothing in it is changed or locked.

    Raises UserError for a folder that holds no run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = user_path(folder)
        self.config: Config
        self.config, self.recipe, _ = load(self.folder / "config.yaml")
        self.id = stored_id(self.folder)

    def __repr__(self) -> str:
        return f"FinishedRun('{self.folder}')"

    def rows(self, every: bool = False) -> list[Row]:
        """Return the rows of the last complete evaluation of every set; with ``every`` all rows that were ever stored."""
        stored = read_rows(self.folder / "results.jsonl")
        return stored if every else newest(latest(stored))

    def frame(self) -> pl.DataFrame:
        """Return ``rows()`` as a polars frame with the columns that ``qatlab.results.frame`` describes."""
        return frame(self.rows())

    def predictions(self, stage: str) -> pl.DataFrame:
        """Return the predictions of a stage, a row per set and image, with the columns of ``qatlab.callbacks.Predictions``.

        Raises UserError where the run has no predictions of that stage.
        """
        folder = self.folder / "predictions"
        known = sorted(path.stem for path in folder.glob("*.parquet"))
        if stage not in known:
            raise UserError(
                f"{folder} has no predictions of the stage '{stage}'{nearest(stage, known)}; there are "
                f"{', '.join(known) or 'none'}."
            )
        return read_table(folder / f"{stage}.parquet")

    def layers(self) -> pl.DataFrame:
        """Return layers.csv, a row per layer with the losses by rounding; raises UserError for a run that rounds nothing."""
        return pl.read_csv(self._file("layers.csv", "it rounds nothing").read_bytes(), infer_schema_length=None)

    def curves(self) -> pl.DataFrame:
        """Return the curves of the training, a row per step; raises UserError for a run without training."""
        return read_curves(self._file("metrics.csv", "it trained nothing"))

    def encoder(self, stage: str | None = None, trust: bool = False) -> nn.Module:
        """Return the image tower of a stage, by default of the last one, in eval mode on the CPU.

        It maps normalised images (B, 3, S, S) to features (B, D), which are not of unit length. With ``trust`` the file
        of the tower may name quantizers that are not qatlab's; their code is then run. Raises UserError for a stage
        without a stored tower.
        """
        from qatlab.models import clip
        from qatlab.models.quantized import load_quantized

        last = TRAINED if self.config.fit.from_scratch else ADAPTED
        files = {QUANTIZED: "quantized.safetensors", last: "model.safetensors"}
        left = [name for name, file in files.items() if (self.folder / file).exists()]
        stage = stage or [FP32, *left][-1]
        if stage not in (*left, FP32):
            raise UserError(
                f"{self.folder} left no image tower of the stage '{stage}'; there are fp32, {', '.join(left)}."
            )
        return (
            clip.load(self.config.model).visual if stage == FP32 else load_quantized(self.folder / files[stage], trust)
        )

    def _file(self, name: str, why: str) -> Path:
        path = self.folder / name
        if not path.exists():
            raise UserError(f"{path} is not there: the run is not finished, or {why}.")
        return path
