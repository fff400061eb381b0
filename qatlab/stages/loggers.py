"""The loggers that curves and results go to: always CSV; W&B, TensorBoard and a user's own loggers as the options say.

Weights & Biases (W&B) is online, offline or disabled, and never asks a question on the terminal.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from tabulate import tabulate

from qatlab.config import Config, WandbConfig, chosen_loggers
from qatlab.config.blocks import build
from qatlab.core.errors import UserError, nearest
from qatlab.core.extras import require
from qatlab.core.files import atomic
from qatlab.core.ranks import is_first
from qatlab.core.secrets import holds_secret, public
from qatlab.results.run import Run

MODES = ("auto", "online", "offline", "disabled")
LONGEST_TAG = 64  # characters that W&B takes in a tag
PATIENCE = 60.0  # seconds that W&B's server may take to open a run, and again to take the last curves at its end


def wandb_mode(mode: str) -> str:
    """Return the mode of W&B: "online", "offline" or "disabled".

    ``auto`` follows the variable WANDB_MODE; without it the mode is online if an API key is configured and the server
    accepts it, else offline. Raises UserError for an unknown mode, and for online without an accepted key.
    """
    option, mode = _asked_for(mode)
    if mode in ("offline", "disabled"):
        return mode
    try:
        refusal = "" if wandb.login(prompt=False) else "no API key is configured"
    # W&B raises this error for a malformed API key, for a key that the server rejects, and for a server that does not
    # answer.
    except wandb.Error as error:
        refusal = str(error).rstrip(".")
        if mode == "auto":
            print(f"W&B: {refusal}; the curves are kept offline.")
    if refusal and mode == "online":
        raise UserError(f"{option}=online, but {refusal}: run `wandb login`, or set wandb.mode=offline.")
    return "offline" if refusal else "online"


def _asked_for(mode: str) -> tuple[str, str]:
    """Return (name of the option or variable, its mode); raises UserError for an unknown mode."""
    option = "wandb.mode"
    if mode == "auto" and os.environ.get("WANDB_MODE"):
        option, mode = "WANDB_MODE", os.environ["WANDB_MODE"]
        mode = "offline" if mode == "dryrun" else mode  # older releases of W&B called the offline mode dryrun
    if mode not in MODES:
        raise UserError(f"{option}={mode} is unknown{nearest(mode, MODES)}; there are {', '.join(MODES)}.")
    return option, mode


class Wandb(WandbLogger):
    """Lightning's logger for W&B, except that no fault of the server or of wandb's own process ends a run.

    Where the server does not open the run, the run is logged offline. Where it stops answering later, the end of the
    run waits for it for ``PATIENCE`` seconds. Where wandb's own process dies, only the CSV logger goes on. A line is
    printed once for each of these.
    """

    def __init__(self, folder: Path, asked: WandbConfig, id: str, offline: bool, **about: Any) -> None:
        # "create_new" gives each of several runs in one process a run of its own at W&B. The settings repeat the mode,
        # because Lightning passes it in WANDB_MODE, which W&B reads only once in a process.
        options = {
            "entity": asked.entity,
            "group": asked.group,
            "notes": asked.notes,
            "reinit": "create_new",
            "settings": _settings(offline),
        }
        super().__init__(id=id, project=asked.project, save_dir=folder, offline=offline, **public(options), **about)
        self._wandb_init.pop("anonymous", None)  # wandb warns about this option even when it is None
        self._folder, self._lost = folder, False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return wandb's run, which the first call opens."""
        said = os.environ.get("WANDB_MODE")
        try:
            return super().experiment
        except wandb.errors.CommError as error:
            print(f"W&B: {_first_line(error)}; the curves are kept offline.", flush=True)
            wandb.teardown()  # ends wandb's process, which still holds the id of the run that did not open
            self._offline = True
            self._wandb_init["settings"] = _settings(offline=True)
            return super().experiment
        finally:
            # Lightning sets WANDB_MODE for an offline run. The next run of this process would take it for the user's
            # choice.
            os.environ.pop("WANDB_MODE", None)
            if said is not None:
                os.environ["WANDB_MODE"] = said

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log the values ``metrics`` at ``step``."""
        if not self._lost:
            with self._outlived():
                super().log_metrics(metrics, step)

    def log_results(
        self, numbers: Mapping[str, float], table: Sequence[Sequence[str]], pictures: Sequence[Path], step: int
    ) -> None:
        """Put ``numbers`` into the run's summary, and log a table, whose first line has the titles, and pictures at ``step``."""
        if self._lost:
            return
        with self._outlived():
            self.experiment.summary.update(dict(numbers))
            # The table is logged as a page. A wandb.Table would become an artifact, for which wandb waits for the
            # server.
            page = wandb.Html(tabulate(table[1:], table[0], tablefmt="html"), inject=False)
            media = {path.stem: wandb.Image(str(path)) for path in pictures}
            super().log_metrics({"results": page, **media}, step)  # type: ignore[dict-item]

    @contextmanager
    def _outlived(self) -> Iterator[None]:
        """Let the run go on, without W&B, where wandb's own process dies inside this context."""
        try:
            yield
        except ConnectionError as error:  # wandb's own process, which sends to the server, has died
            self._lost = True
            print(f"W&B: {_first_line(error)}; the curves are kept in {self._folder / 'curves'}.", flush=True)

    def finish(self) -> Path | None:
        """Wait until the server has all curves; return the local folder of the run where this took too long, else None."""
        # The first logged value opens W&B's run: without a value, or without wandb's process, there is nothing to wait
        # for.
        if self._experiment is None or self._lost:
            return None
        try:
            self._experiment.finish()
        except TimeoutError:
            unsent = Path(self._experiment.settings.sync_dir)
            print(f"W&B: no answer for {PATIENCE:g} s; the curves are kept in {unsent}.", flush=True)
            return unsent
        return None


class Curves(CSVLogger):
    """Lightning's logger for CSV files, in ``<folder>/curves``, except that a full disk destroys nothing written before.

    Lightning writes the whole file again when a value has a new name. If that write failed, half a file would be left.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="curves")

    @rank_zero_only
    def save(self) -> None:
        """Write the values held in memory to a copy of the file, which then replaces it; UserError where the disk is full."""
        writer = self.experiment
        if not writer.metrics:
            return
        path, names = Path(writer.metrics_file_path), list(writer.metrics_keys)
        try:
            with atomic(path) as temporary:
                if path.exists():
                    shutil.copyfile(path, temporary)
                else:
                    temporary.unlink()  # Lightning writes the names of the columns only to a file that does not exist
                writer.metrics_file_path = str(temporary)
                super().save()
        except BaseException:
            writer.metrics_keys = names  # forgets names that were not written, so that the next call adds their columns
            raise
        finally:
            writer.metrics_file_path = str(path)


class TensorBoard(TensorBoardLogger):
    """Lightning's logger for TensorBoard; all processes of a run write to the same folder, ``<folder>/tensorboard``."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        require("tensorboard", extra="tensorboard")
        super().__init__(save_dir=folder, name="", default_hp_metric=False)
        self._folder, self.hparams = folder, options

    @property
    def log_dir(self) -> str:
        """Return the folder of the files under its exact name; Lightning would replace "$NAME" in it by a variable."""
        return str(self._folder / "tensorboard")

    def log_results(
        self, numbers: Mapping[str, float], table: Sequence[Sequence[str]], pictures: Sequence[Path], step: int
    ) -> None:
        """Log ``numbers`` together with the options, a table, whose first line has the titles, and pictures at ``step``."""
        self.log_hyperparams(self.hparams, dict(numbers), step)
        self.experiment.add_text("results", tabulate(table[1:], table[0], tablefmt="github"), step)
        for path in pictures:
            with Image.open(path) as picture:
                self.experiment.add_image(path.stem, np.asarray(picture.convert("RGB")), step, dataformats="HWC")


def _settings(offline: bool) -> Any:
    return wandb.Settings(
        silent=True,
        mode="offline" if offline else "online",
        init_timeout=PATIENCE,
        finish_timeout=PATIENCE,
        finish_timeout_raises=True,
        # W&B's metadata hold the command line, which may hold a password or a signed address.
        x_disable_meta=any(map(holds_secret, sys.argv)),
    )


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, without a full stop."""
    return str(error).split("\n")[0].rstrip(".")


def build_loggers(config: Config, run: Run, recipe: str) -> list[Logger]:
    """Return the CSV logger, and on the first process also the loggers of ``logger=``.

    No logger writes anything before its first value. Raises UserError for a logger that is unknown or not installed,
    and for names that W&B does not take.
    """
    loggers: list[Logger] = [Curves(run.folder)]
    _asked_for(config.wandb.mode)  # raises UserError for an unknown mode, also in a run without W&B
    choices = chosen_loggers(config.logger)
    for key, choice in choices.items() if is_first() else ():
        if choice == "wandb":
            loggers += _wandb(config, run, recipe)
        elif choice == "tensorboard":
            loggers.append(TensorBoard(run.folder, options_of(run, recipe)))
        elif choice != "csv":
            loggers.append(_own(key, choice))
    return loggers


def check_loggers(config: Config) -> None:
    """Raise UserError where wandb.mode asks for W&B and logger= leaves it out."""
    named = chosen_loggers(config.logger).values()
    if config.wandb.mode in ("online", "offline") and "wandb" not in named:
        raise UserError(
            f"wandb.mode={config.wandb.mode}, but logger={config.logger} leaves W&B out: add wandb to it, logger=[wandb,...], "
            "or leave wandb.mode out."
        )


def _wandb(config: Config, run: Run, recipe: str) -> list[Logger]:
    """Return a list with the W&B logger, [] where W&B is disabled."""
    _check_names(config.wandb)
    about = {"name": config.wandb.name or f"{recipe}-{run.id}", "job_type": recipe, "tags": _tags(config)}
    if (mode := wandb_mode(config.wandb.mode)) == "disabled":
        return []
    options = options_of(run, recipe)
    return [Wandb(run.folder, config.wandb, run.id, mode == "offline", config=options, **public(about))]


def _check_names(config: WandbConfig) -> None:
    """Raise UserError for names and tags that W&B refuses; W&B itself would fail at the first value, perhaps hours later."""
    try:
        wandb.Settings(silent=True, project=config.project)
    except (wandb.Error, ValueError) as error:
        raise UserError(f"wandb.project={config.project} cannot be taken: {_first_line(error)}.") from error
    for tag in config.tags:
        if len(tag) > LONGEST_TAG:
            raise UserError(f"wandb.tags holds '{tag}': W&B takes texts of at most {LONGEST_TAG} characters.")


def _own(key: str, block: Mapping[str, Any]) -> Logger:
    """Return a user's own logger, built from the ``block`` of the option ``key``; UserError if it is no Lightning logger."""
    logger = build(block)
    if not isinstance(logger, Logger):
        raise UserError(f"{key}: {block['_target_']} is no logger: expected a subclass of Lightning's Logger.")
    return logger


def options_of(run: Run, recipe: str) -> dict[str, Any]:
    """Return {dotted name: value} of the options of a run, without secrets, with recipe, id, commit and versions."""
    common = run.common()
    versions = {f"versions.{name}": version for name, version in common["versions"].items()}
    return {**common["config"], "recipe": recipe, "run_id": run.id, "commit": common["commit"], **versions}


def _tags(config: Config) -> list[str]:
    """Return the W&B tags of a run: model, weights, bits and seed, which tell runs of a sweep apart, and ``wandb.tags``.

    The bits are those of the options. A plan or rules may give some layers other bits; the tag then says so, for
    example "W8A8+rules". Rows hold the bits of the layers.
    """
    bits = [
        f"{letter}{block.get('bits')}"
        for letter, block in (("W", config.quant.weight), ("A", config.quant.act))
        if block
    ]
    exceptions = [f"+{name}" for name in ("plan", "rules") if bits and getattr(config.quant, name)]
    tags = [config.model.name, config.model.pretrained, "".join([*bits, *exceptions]), f"seed {config.seed}"]
    # A long name, such as the path of a file, is cut at the front, because models differ more at the end of their
    # paths.
    found = [tag[-LONGEST_TAG:] for tag in tags if tag]
    return list(dict.fromkeys([*found, *config.wandb.tags]))
