"""Curves: CSV always, Weights & Biases online, offline or not at all, never with a question on the terminal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import polars as pl
import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

from qatlab.cache import atomic
from qatlab.config import Config, WandbConfig
from qatlab.errors import UserError, nearest
from qatlab.results import Run, is_rank_zero

MODES = ("auto", "online", "offline", "disabled")
PATIENCE = 60.0  # seconds that a server may take to open a run, and at its end to take what it has not yet got


def wandb_mode(mode: str) -> str:
    """Return online, offline or disabled: ``auto`` follows WANDB_MODE, else is online where a key is configured and accepted.

    Raises UserError for another word, and for online without such a key.
    """
    option, mode = _asked_for(mode)
    if mode in ("offline", "disabled"):
        return mode
    try:
        refusal = "" if wandb.login(prompt=False) else "no API key is configured"
    except wandb.Error as error:  # a malformed key, or no answer from the server
        refusal = str(error).rstrip(".")
        if mode == "auto":
            print(f"W&B: {refusal}; the curves are kept offline.")
    if refusal and mode == "online":
        raise UserError(f"{option}=online, but {refusal}: run `wandb login`, or set wandb.mode=offline.")
    return "offline" if refusal else "online"


def _asked_for(mode: str) -> tuple[str, str]:
    """Return (where it was said, the mode); raises UserError for an unknown word."""
    option = "wandb.mode"
    if mode == "auto" and os.environ.get("WANDB_MODE"):
        option, mode = "WANDB_MODE", os.environ["WANDB_MODE"]
        mode = "offline" if mode == "dryrun" else mode  # W&B's older word
    if mode not in MODES:
        raise UserError(f"{option}={mode} is unknown{nearest(mode, MODES)}; there are {', '.join(MODES)}.")
    return option, mode


class Wandb(WandbLogger):
    """Lightning's logger for Weights & Biases, except that no fault of the server or of wandb's own process ends a run.

    A server that does not open the run leaves it offline, one that stops answering later gets its share of ``PATIENCE``
    at the end, and without wandb's process only the CSV goes on. Each is said once.
    """

    def __init__(self, folder: Path, config: WandbConfig, id: str, offline: bool, **shown: Any) -> None:
        # reinit: a run of its own for each of several in one process. The mode goes into the settings too: WANDB_MODE,
        # which Lightning sets, is read only once per process.
        options = {
            "entity": config.entity,
            "group": config.group,
            "reinit": "create_new",
            "settings": _settings(offline),
        }
        super().__init__(id=id, project=config.project, save_dir=folder, offline=offline, **options, **shown)
        self._wandb_init.pop("anonymous", None)  # wandb warns about it even when it is None
        self._folder, self._lost = folder, False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return wandb's run, begun at the first call."""
        said = os.environ.get("WANDB_MODE")
        try:
            return super().experiment
        except wandb.errors.CommError as error:
            print(f"W&B: {_first_line(error)}; the curves are kept offline.", flush=True)
            wandb.teardown()  # its process holds the id of the run that did not open
            self._offline = True
            self._wandb_init["settings"] = _settings(offline=True)
            return super().experiment
        finally:
            # Lightning sets it for an offline run: the next run of this process shall not take it for the user's word.
            os.environ.pop("WANDB_MODE", None)
            if said is not None:
                os.environ["WANDB_MODE"] = said

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Add the values at ``step``."""
        if self._lost:
            return
        try:
            super().log_metrics(metrics, step)
        except ConnectionError as error:  # wandb's own process is gone
            self._lost = True
            print(f"W&B: {_first_line(error)}; the curves are kept in {self._folder / 'curves'}.", flush=True)

    def finish(self) -> Path | None:
        """Wait until the server has everything; returns the folder of the run where it did not take it in time."""
        if self._experiment is None or self._lost:
            return None
        try:
            self._experiment.finish()
        except TimeoutError:
            unsent = Path(self._experiment.settings.sync_dir)
            print(f"W&B: no answer for {PATIENCE:g} s; the curves are kept in {unsent}.", flush=True)
            return unsent
        return None


def _settings(offline: bool) -> Any:
    return wandb.Settings(
        silent=True,
        mode="offline" if offline else "online",
        init_timeout=PATIENCE,
        finish_timeout=PATIENCE,
        finish_timeout_raises=True,
    )


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].rstrip(".")


def build_loggers(config: Config, run: Run, recipe: str) -> list[Logger]:
    """Return the CSV logger, and W&B's unless it is disabled; nothing is written before the first value."""
    loggers: list[Logger] = [CSVLogger(run.folder, name="curves")]
    _asked_for(config.wandb.mode)
    if not (config.fit.steps and is_rank_zero()):
        return loggers  # no curves: the server is not asked
    if (mode := wandb_mode(config.wandb.mode)) != "disabled":
        shown = {"name": f"{recipe}-{run.id}", "job_type": recipe, "tags": _tags(config)}
        loggers.append(Wandb(run.folder, config.wandb, run.id, mode == "offline", **shown))
    return loggers


def _tags(config: Config) -> list[str]:
    """Return what runs are told apart by in a sweep: model, weights, bits and seed."""
    bits = [
        f"{letter}{block.get('bits')}"
        for letter, block in (("W", config.quant.weight), ("A", config.quant.act))
        if block
    ]
    tags = [config.model.name, config.model.pretrained, "".join(bits), f"seed {config.seed}"]
    return [tag for tag in tags if tag]


def merge_curves(folder: Path) -> Path | None:
    """Return metrics.csv: the curves of every process that worked on the run, one line per step, the latest value kept."""
    # By number and not by time: the clocks of two nodes differ.
    parts = sorted((folder / "curves").glob("version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:]))
    frames = [pl.read_csv(path, infer_schema_length=None) for path in parts if path.stat().st_size]
    if not frames:
        return None
    curves = pl.concat(frames, how="diagonal_relaxed").group_by("step").agg(pl.all().drop_nulls().last()).sort("step")
    with atomic(folder / "metrics.csv") as path:
        curves.write_csv(path)
    return folder / "metrics.csv"
