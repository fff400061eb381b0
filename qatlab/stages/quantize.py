"""The quantizing stage of a run: towers are calibrated or read back, every quantizer is checked, and losses are measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.config import QuantConfig, is_quantized
from qatlab.config.trust import targets
from qatlab.core.damage import whole
from qatlab.models.clip import Clip
from qatlab.models.quantized import (
    QUANTIZED,
    TEXT,
    fill,
    fitted_copy,
    fitted_text,
    left_alone,
    products_left,
    read_quantized,
    save_quantized,
    stored_copy,
    stored_options,
    stored_text,
    tower_files,
    unadapted,
    whole_tower,
)
from qatlab.models.text_tower import TextTower, class_drift
from qatlab.quant import full_precision, layer_report, quant_layers, verify
from qatlab.quant.inspect.bits import planned_bits
from qatlab.quant.inspect.coverage import SHARES, coverage, statement, warning
from qatlab.quant.inspect.kept import kept_channels, told
from qatlab.quant.inspect.registers import told as registers_told
from qatlab.quant.layers.walk import evaluating
from qatlab.results.run import Run
from qatlab.stages.experiment import Experiment
from qatlab.stages.towers import RunTowers

LAYERS = "layers.csv"
REPORT_SAMPLES = 16  # samples on which layers.csv is measured and the distinct values of quantizers are counted


def quantize_towers(experiment: Experiment, finished: bool = False) -> None:
    """Replace the towers of ``experiment`` by quantized ones; writes layers.csv, and class_drift.csv for a text tower.

    A stored tower is read back, and a tower with a damaged file is calibrated again. With ``finished`` a damaged file
    raises UserError instead, because scoring makes no models.
    """
    towers, run = experiment.towers, experiment.run
    reports: list[tuple[nn.Module, Tensor]] = []  # (quantized model, input that layers.csv is measured on)
    calibrated: dict[str, nn.Module] = {}  # {name of a file: the tower that this process calibrates and writes there}
    if is_quantized(towers.asked, "visual"):
        if (stored := _stored(experiment, QUANTIZED, finished)) is not None:
            _read_image_tower(experiment, *stored)
        else:
            _fit_image_tower(experiment)
            calibrated[QUANTIZED] = towers.student.visual
        reports.append((towers.student.visual, experiment.captions.normalized(REPORT_SAMPLES)))
    if is_quantized(towers.asked, "text"):
        text, is_new = _text_tower(experiment, finished)
        if is_new:
            calibrated[TEXT] = text
        _move_classes(experiment)
        reports.append((text, _tokens(experiment)[:REPORT_SAMPLES]))
    # layers.csv is written when a tower was calibrated, and when the file is lost. A run that is only scored keeps its
    # file.
    if calibrated or not (finished or run.read_only or whole(run.folder / LAYERS, _read_layers)):
        # None: polars reads all rows to choose the types, because a column may have no value in the first hundred
        # layers.
        table = pl.DataFrame(list(_reported(reports)), infer_schema_length=None)
        run.write(LAYERS, lambda path: table.write_csv(path))
    # The towers are stored last, because the stage counts as finished once their files exist.
    for name, module in calibrated.items():
        run.write(name, partial(_save, module, towers))


def _save(module: nn.Module, towers: RunTowers, path: Path) -> None:
    save_quantized(module, path, towers.model, towers.quant)


class Covered(NamedTuple):
    """How much of the quantized towers is rounded: ``shares`` for rows, and ``lines`` in words, with what a rewrite left alone."""

    shares: dict[str, float]
    lines: list[str]


def covered(config: QuantConfig, clip: Clip, run: Run, visual: nn.Module | None, text: nn.Module | None) -> Covered:
    """Return how much of the products of ``visual`` and ``text``, the quantized copies of the towers, is rounded.

    The products are counted in a forward pass of one image and one caption, unless the run already has rows with the
    shares. Raises UserError where less than half is rounded, ``quant.partial`` is false and no tower is stored yet.
    """
    # A run that rounds only activations is judged by its activations, any other run by its weights.
    judged = "act" if config.weight is None else "weight"
    known = next((row for row in run.rows() if row.get(SHARES[0]) is not None), None)
    left = []
    if visual is not None:
        layers = quant_layers(visual)
        left += [*left_alone(clip.visual, layers, config), *unadapted(layers), *products_left(visual)]
    if text is not None:
        left += [*left_alone(TextTower(clip.model), quant_layers(text), config), *products_left(text)]
    if known is not None:
        # A run that has rows was judged when it was made, and a later limit must not make it unusable.
        shares = {name: known[name] for name in SHARES}
        return Covered(shares, [statement(shares), *warning(shares, judged), *left])
    found = []
    if visual is not None:
        size = clip.preprocess.size
        found.append(coverage(visual, torch.zeros(1, 3, size, size), config.rules, judged))
    if text is not None:
        assert clip.tokenizer is not None
        # A tokenizer knows how many tokens a text has here; models from Hugging Face have room for more than they take.
        found.append(coverage(text, clip.tokenizer(["a photo"]), config.rules, judged))
    together = found[0].beside(found[1]) if len(found) > 1 else found[0]
    if any(not (run.folder / name).exists() for name in tower_files(config)):
        together.require(config.partial)
    return Covered(together.shares, [statement(together.shares), *together.told(), *left])


def _stored(experiment: Experiment, name: str, finished: bool) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return (tensors, description of how the tower is built) of a tower's file; None where the tower must be calibrated."""
    # The file may name qatlab's own classes and the classes that the options of this command name; others need
    # trust=true.
    path, named = experiment.run.folder / name, targets(experiment.config)
    # Where the tower cannot be calibrated again, a damaged file is an error; else the file is set aside, and None
    # returned.
    read = read_quantized if finished or experiment.run.read_only else whole_tower
    return read(path, experiment.config.trust, named)


def _read_image_tower(experiment: Experiment, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Replace the student's image tower by the stored one."""
    towers, visual = experiment.towers, experiment.towers.full.visual
    towers.quant = stored_options(about, visual, tensors)
    towers.student.visual = stored_copy(visual, towers.quant, about)
    fill(towers.student.visual, tensors, experiment.run.folder / QUANTIZED)


def _fit_image_tower(experiment: Experiment) -> None:
    """Replace the student's image tower by one that is quantized and calibrated now."""
    towers, captions, processes = experiment.towers, experiment.captions, experiment.processes
    processes.say(f"calibrating on {captions.images} images of {captions.data.name}")
    images = captions.normalized(captions.images)

    # This is a function because a rewrite, a plan and the calibration each read the images from the start.
    def batches() -> Iterator[Tensor]:
        return (chunk.to(processes.device) for chunk in images.split(experiment.config.suite.batch_size))

    visual = towers.full.visual.to(processes.device)
    towers.student.visual, towers.quant = fitted_copy(visual, towers.asked, batches, processes.say)
    if towers.asked.plan is not None:
        processes.say(f"  {planned_bits(towers.student.visual)}")
    if towers.asked.outliers is not None:
        processes.say(f"  {told(kept_channels(towers.student.visual))}")
    if towers.asked.registers is not None:
        cosine = _unrounded_cosine(visual, towers.student.visual, images[:REPORT_SAMPLES].to(processes.device))
        processes.say(
            f"  {registers_told(towers.student.visual)}; cosine to full precision before rounding {cosine:.4f}"
        )


def _unrounded_cosine(full: nn.Module, quantized: nn.Module, images: Tensor) -> float:
    """Return the mean cosine of the features of ``full`` and of ``quantized``, which rounds nothing here, on ``images``."""
    with evaluating(full), evaluating(quantized), full_precision(quantized):
        return float(F.cosine_similarity(full(images), quantized(images), dim=-1).mean())


def _text_tower(experiment: Experiment, finished: bool) -> tuple[TextTower, bool]:
    """Return (quantized text tower, whether it was calibrated now); from now on this tower encodes the class prompts."""
    towers, processes = experiment.towers, experiment.processes
    assert towers.full.model is not None
    stored = _stored(experiment, TEXT, finished)
    if stored is not None:
        text = stored_text(towers.full.model, stored[1])
        fill(text, stored[0], experiment.run.folder / TEXT)
        rules = stored[1]["quant"]["rules"]
    else:
        text, rules = _fit_text_tower(experiment)
    # The bits that were planned for the text tower join those of the image tower.
    towers.quant = replace(towers.quant, rules={**towers.quant.rules, **rules})
    # text_calls=0, because the summary adds the calls of this tower to the calls of the full-precision one.
    towers.class_clip = replace(towers.full, model=text.text.to(processes.device).eval(), text_calls=0)
    return text, stored is None


def _fit_text_tower(experiment: Experiment) -> tuple[TextTower, dict[str, Any]]:
    """Return a text tower that is quantized and calibrated now, and the rules of its layers with the bits planned."""
    towers, captions, processes = experiment.towers, experiment.captions, experiment.processes
    processes.say(f"calibrating the text tower on {captions.images} captions of {captions.data.name}")
    tokens = _tokens(experiment)
    model: Any = towers.full.model
    batches = partial(tokens.split, experiment.config.suite.batch_size)
    text, quant = fitted_text(model.to(processes.device), towers.asked, batches, processes.say)
    if towers.asked.plan is not None:
        processes.say(f"  {planned_bits(text)}")
    if towers.asked.outliers is not None:
        processes.say(f"  {told(kept_channels(text))}")
    return text, quant.rules


def _tokens(experiment: Experiment) -> Tensor:
    """Return the tokens (n, L) of the captions that the text tower is calibrated on."""
    captions, tokenizer = experiment.captions, experiment.towers.full.tokenizer
    assert tokenizer is not None
    return tokenizer(captions.samples.captions[: captions.images]).to(experiment.processes.device)


def _move_classes(experiment: Experiment) -> None:
    """Replace the student's class embeddings by those of the quantized text tower; writes and prints how far they moved."""
    towers = experiment.towers
    before = towers.student.heads
    towers.student.encode_classes(towers.class_clip)
    tables = []
    for reference, head in before.items():
        drift = class_drift(head.classes, towers.student.heads[reference].classes)
        tables.append(drift.with_columns(pl.lit(reference).alias("reference")))
    table = pl.concat(tables)
    experiment.run.write("class_drift.csv", lambda path: table.write_csv(path))
    cosines: list[float] = table["cosine"].to_list()
    mean, least = sum(cosines) / len(cosines), min(cosines)
    towers.drift = {"class_cosine_mean": mean, "class_cosine_min": least}
    experiment.processes.say(
        f"  class embeddings: cosine to those of the full-precision text tower {mean:.4f} on average, least {least:.4f} "
        f"({table['class'][cosines.index(least)]})"
    )


def _read_layers(path: Path) -> bool:
    """Return True for a file that holds a table of layers; raises ValueError for any other file."""
    with path.open("rb") as file:
        table = pl.read_csv(file, infer_schema_length=None)
    if not {"layer", "kind", "output_sqnr_db"} <= set(table.columns) or not len(table):
        raise ValueError("it holds no table of layers")
    return True


def _reported(models: list[tuple[nn.Module, Tensor]]) -> Iterator[dict[str, Any]]:
    """Yield a row of layers.csv for each layer of the ``models`` (model, its input), after its quantizers were checked."""
    for model, few in models:
        # verify comes first, because it raises for a quantizer that gives more distinct values than its bits allow.
        few = few.to(next(model.parameters()).device)
        verify(model, few)
        yield from layer_report(model, few)
