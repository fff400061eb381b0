"""Curves: CSV always, Weights & Biases online, offline or not at all, never with a question on the terminal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import polars as pl
import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from qatlab.cache import atomic
from qatlab.config import Config
from qatlab.errors import UserError, nearest
from qatlab.results import Run, is_rank_zero

MODES = ("auto", "online", "offline", "disabled")


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
    if mode not in MODES:
        raise UserError(f"{option}={mode} is unknown{nearest(mode, MODES)}; there are {', '.join(MODES)}.")
    return option, mode


def build_loggers(config: Config, run: Run, recipe: str) -> list[Logger]:
    """Return the CSV logger, and W&B's unless it is disabled; nothing is written before the first value."""
    loggers: list[Logger] = [CSVLogger(run.folder, name="curves")]
    _asked_for(config.wandb.mode)
    if not (config.fit.steps and is_rank_zero()):
        return loggers  # no curves: the server is not asked
    if (mode := wandb_mode(config.wandb.mode)) != "disabled":
        # The mode goes into the settings too: WANDB_MODE, which Lightning sets, is read only once per process.
        settings: Any = wandb.Settings(silent=True, mode="offline" if mode == "offline" else "online")
        logger = WandbLogger(
            name=f"{recipe}-{run.id}",
            id=run.id,
            project=config.wandb.project,
            entity=config.wandb.entity,
            save_dir=run.folder,
            offline=mode == "offline",
            settings=settings,
        )
        logger._wandb_init.pop("anonymous", None)  # wandb warns about it even when it is None
        loggers.append(logger)
    return loggers


def merge_curves(folder: Path) -> Path | None:
    """Return metrics.csv: the curves of every process that worked on the run, one line per step, the latest value kept."""
    parts = sorted((folder / "curves").glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    frames = [pl.read_csv(path, infer_schema_length=None) for path in parts if path.stat().st_size]
    if not frames:
        return None
    curves = pl.concat(frames, how="diagonal_relaxed").group_by("step").agg(pl.all().drop_nulls().last()).sort("step")
    with atomic(folder / "metrics.csv") as path:
        curves.write_csv(path)
    return folder / "metrics.csv"
