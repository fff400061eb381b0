"""The export of a run: an integer model is written, compared with the simulation, scored, and only then put in place."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from torch import Tensor, nn

from qatlab.core.errors import UserError
from qatlab.deploy.agreement import LIMIT as FARTHEST
from qatlab.deploy.agreement import EndToEnd, agreement, compare_features, compare_rows
from qatlab.deploy.bundle import describe, update, write_classes
from qatlab.deploy.contents import CHECK, LAYER
from qatlab.deploy.cpu import cpu, lacks_vnni
from qatlab.deploy.formats import onnx, openvino
from qatlab.deploy.integer import Classifier, integer_copy, integer_layers
from qatlab.deploy.parity import IN_PLACE, LIMIT, BlockParity, LayerParity, Part, compare_blocks, compare_layers
from qatlab.deploy.runtimes import Runtime, opener
from qatlab.deploy.saturation import wide_layers
from qatlab.deploy.stored import features_of, telling_layer
from qatlab.deploy.tower import DeployedTower
from qatlab.evaluation.embedding import Encoder, embed
from qatlab.reports.card import write_card
from qatlab.results.rowfile import Row
from qatlab.results.stages import FP32
from qatlab.stages.experiment import Experiment
from qatlab.stages.reopen import add_exports
from qatlab.stages.score import score
from qatlab.stages.temperature import scale_to_export
from qatlab.stages.threshold import threshold_set, write_threshold
from qatlab.suites.pools import places_of, pool_of
from qatlab.suites.source import View
from qatlab.suites.suite import EvaluationSet

IMAGES = 16  # images on which every layer is compared; each image gives a layer as many inputs as it has tokens
EXACT = (
    "format=onnx exact=true multiplies unsigned weights, which every CPU does exactly; for other formats make the run with "
    "quant.weight.bits=7"
)


class Written(NamedTuple):
    """An integer model that was written: its ``file``, and ``model``, the file opened by its runtime.

    ``part(layer)`` returns one layer as the runtime runs it, ``write_layer(layer, input, path)`` writes one layer to a
    file, and ``count(images)`` returns how many layers the runtime computes in integers;
    ``blocks(names, images)`` returns the outputs of blocks in the running model.
    """

    file: Path
    model: Runtime
    part: Callable[[str], Part]
    write_layer: Callable[[str, np.ndarray, Path], None]
    count: Callable[[Tensor], int]
    blocks: Callable[[Sequence[str], np.ndarray], dict[str, np.ndarray]]


def export(experiment: Experiment, form: str) -> Path:
    """Return the folder of a run's integer model in the format ``form``, after it was checked, scored and given its card.

    Raises UserError for a run without exact integer form, and for a model that fails a check. Such a model is left in
    the folder ``<format>.failed``, where it can be examined.
    """
    folder = experiment.run.folder / "export" / form
    # The folder is called "<format>.failed" until every check has passed, so that a folder with the name of the format
    # has always passed all checks.
    draft = folder.with_name(f"{form}.failed")
    threshold_set(experiment)  # a mistake in threshold= ends the command before anything is written
    # The first ID set gives the classes that probabilities are computed for, and the images whose features must be
    # close to the features of the simulation.
    inside = next(entry for entry in experiment.suite.sets if entry.source.role == "id")
    served = scale_to_export(experiment)
    tower = _written(experiment, form, draft, inside, served)
    simulated = experiment.stages[-1]
    views = [experiment.view(FP32), experiment.view(simulated)]
    # If the served scale was refitted, the integer model is compared with the simulation's rows at this scale.
    views += [served] if served.fitted else []
    views += add_exports(experiment, [tower])
    score([(experiment, views)])
    rows = _rows(experiment, views)
    compared = served.stage if served.fitted else simulated
    measured, integer = {}, dict[str, Tensor]()
    for entry in experiment.suite.sets:
        if entry.source.role != "calibration":
            features = _features(experiment, entry)
            measured[entry.source.name] = _compare(experiment, entry, features, tower.stage)
            integer[entry.source.name] = features[tower.stage]
    about = update(
        draft,
        end_to_end={"of": inside.source.name, **measured[inside.source.name]._asdict()},
        sets={name: agreed._asdict() for name, agreed in measured.items()},
        in_distribution=write_threshold(experiment, draft, integer, served.logit_scale),
    )
    # This check comes after export.json was written, so that a folder that fails holds the numbers of the failure.
    _require_whole(inside.source.name, measured, compare_rows(rows, compared, tower.stage), draft)
    first = measured[inside.source.name]
    experiment.processes.say(
        f"  features of {inside.source.name} {first.integer:.1e} from the simulation's, those {first.simulated:.1e} from full "
        "precision"
    )
    experiment.processes.say(f"  answers that are the simulation's: {agreement(measured)}")
    shown = [row for row in rows if row["stage"] in (FP32, compared, tower.stage)]
    write_card(draft, about, shown, experiment.run.folder, compared, tower.stage)
    # An earlier export is removed only now, after the new one has passed.
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    return folder


def origin(served: View) -> str:
    """Return in words the origin of the logit scale that probabilities are computed with."""
    if not served.fitted:
        return "the model's own, which no refit on this suite's calibration images replaced"
    return f"refitted on the calibration images {served.basis}" if served.basis else "refitted without labels"


def _written(experiment: Experiment, form: str, draft: Path, inside: EvaluationSet, served: View) -> DeployedTower:
    """Return the integer model, after it was written into ``draft`` and each layer was compared with the simulation.

    Raises UserError for a layer that differs, and for a layer that the runtime computes in floats.
    """
    config, student, say = experiment.config, experiment.towers.student, experiment.processes.say
    encoder = integer_copy(student.visual.cpu())  # the runtimes of exports compute on the CPU
    # Only ONNX can be written with unsigned weights, which need no VNNI. In the other formats an exact model needs
    # weights of at most 7 bits.
    if config.exact and form != "onnx":
        _require_narrow(encoder, form)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    integer: nn.Module = encoder
    if config.probabilities:
        classes = student.heads[inside.source.reference].classes
        integer = Classifier(encoder, classes.features, served.logit_scale, served.logit_bias).eval()
    layers = len(integer_layers(integer))
    say(f"exporting {layers} layers to {form}; logit scale {served.logit_scale:.4g}, {origin(served)}")
    written = _write(experiment, integer, draft, form)
    images = _images(experiment, inside)
    # Layers are compared before anything is scored: here a wrong layer is named, later it would only lower the
    # accuracy.
    found = compare_layers(student.visual, images, written.part)
    pl.DataFrame(found, schema=list(LayerParity._fields), orient="row").write_csv(draft / "parity.csv")
    integers = written.count(images)
    _require_layers(found, integers, draft, [] if config.exact else wide_layers(encoder))
    blocks = compare_blocks(student.visual, images, written.blocks, Tensor(written.model(images.numpy())))
    pl.DataFrame(blocks, schema=list(BlockParity._fields), orient="row").write_csv(draft / "blocks.csv")
    _require_blocks(blocks, form, draft)
    worst = max(blocks, key=lambda of: of.error / of.simulated)
    say(
        f"  {integers} of {layers} layers in integers; on the same input at most {max(of.mismatch for of in found):.1e} of the "
        f"codes differ, and where none does the output is {max(of.product_error for of in found):.1e} off"
    )
    say(
        f"  in the running model '{worst.block}' is the furthest off: {worst.error:.1e}, where the simulation is "
        f"{worst.simulated:.1e} from full precision"
    )
    check = _store_input(experiment, encoder, written, images, form)
    heads = student.heads
    write_classes(draft, {name: (of.classes.features.numpy(), of.classes.names) for name, of in heads.items()})
    describe(
        draft,
        written.file,
        form,
        integer,
        config.exact,
        check=check,
        run=experiment.run.id,
        **experiment.facts(experiment.stages[-1]) | _sigmoids(served),
        features=int(next(iter(heads.values())).classes.features.shape[1]),
        preprocess=asdict(experiment.towers.full.preprocess),
        logit_scale=served.logit_scale,
        logit_scale_of=origin(served),
    )
    kept = {of.layer: of.outlier_channels for of in found if of.outlier_channels}
    if kept:
        update(draft, outlier_channels=kept)
    update(draft, integer_layers=integers, blocks={of.block: [of.error, of.simulated] for of in blocks})
    return DeployedTower(draft, written.model)


def _sigmoids(served: View) -> dict[str, Any]:
    """Return what export.json says besides the logit scale where probabilities are sigmoids; {} where they are a softmax."""
    # A model with a bias may be served with a softmax all the same, so the bias alone would not tell.
    return {} if served.logit_bias is None else {"zeroshot": "sigmoid", "logit_bias": served.logit_bias}


def _rows(experiment: Experiment, views: Sequence[View]) -> list[Row]:
    """Return the stored rows of the suite's sets under ``views``."""
    asked = set()
    for view in views:
        asked |= {(view.stage, of.source.name, view.definition(of.source)) for of in experiment.suite.sets}
    return [row for row in experiment.run.rows() if (row["stage"], row["dataset"], row["definition"]) in asked]


def _write(experiment: Experiment, integer: nn.Module, folder: Path, form: str) -> Written:
    """Return the integer model after it was written to ``folder`` and opened by its runtime."""
    size = experiment.towers.full.preprocess.size
    if form == "torch":
        from qatlab.deploy.formats import inductor as program

        file = program.write(integer, folder, size)
        programs, compiled = program.LayerPrograms(integer), program.TorchModel(file)
        count = partial(program.integer_products, compiled)
        blocks = partial(program.block_outputs, integer, size)
        return Written(file, compiled, programs.part, programs.write, lambda images: count(images.numpy()), blocks)
    if form == "onnx":
        file = onnx.write(integer, folder, size, experiment.config.exact)
        models = onnx.LayerModels(file, integer)
        blocks = partial(onnx.block_outputs, file)
        return Written(
            file, onnx.OnnxModel(file), models.part, models.write, lambda _: onnx.integer_products(file), blocks
        )
    source = openvino.source(integer, folder, size)
    models = onnx.LayerModels(source, integer)
    representation = openvino.write(source, folder)
    source.unlink()  # the ONNX file was needed only to make OpenVINO's own format; LayerModels has read it
    served = openvino.OpenVinoModel(representation)
    part = partial(openvino.part, models)
    blocks = partial(openvino.block_outputs, representation)
    return Written(representation, served, part, models.write, lambda _: served.integer_products()[1], blocks)


def _store_input(
    experiment: Experiment, encoder: nn.Module, written: Written, images: Tensor, form: str
) -> dict[str, Any]:
    """Write check.npz and one layer of the model; return the limits that other machines are checked against.

    check.npz holds inputs with the outputs that the runtime gives for them on this machine.
    """
    # A runtime on another machine must give the same outputs for the stored inputs.
    layer = telling_layer(experiment.towers.student.visual, encoder, images)
    path = written.file.with_name(LAYER[form])
    written.write_layer(layer.name, layer.x, path)
    arrays, check = features_of(written.model, encoder, experiment.towers.full.visual.cpu(), images)
    arrays |= {"layer_input": layer.x, "layer_output": opener(form)(path)(layer.x)}
    np.savez(path.with_name(CHECK), allow_pickle=False, **arrays)
    return {**check, "layer": {"name": layer.name, "limit": layer.limit, "lost": layer.lost}}


def _compare(experiment: Experiment, entry: EvaluationSet, features: dict[str, Tensor], stage: str) -> EndToEnd:
    """Return how far the integer model's ``features`` of a set's images are from the features of the simulation.

    ``features`` are by stage, as ``_features`` returns them; ``stage`` is the stage of the integer model.
    """
    classes = experiment.towers.student.heads[entry.source.reference].classes.features
    return compare_features(features[FP32], features["simulated"], features[stage], classes)


def _features(experiment: Experiment, entry: EvaluationSet) -> dict[str, Tensor]:
    """Return {"fp32", "simulated" or an integer stage: features (n, D)} of a set's images, from the stores or computed."""
    towers, suite = experiment.towers, experiment.config.suite
    visuals: dict[str, nn.Module] = {FP32: towers.full.visual, "simulated": towers.student.visual, **towers.exports}
    keys = {name: towers.key(visual) for name, visual in visuals.items()}
    # Scoring has stored most of these features before, so that only missing ones are embedded here.
    encoders = [Encoder(keys[name], visual, towers.full.preprocess, [entry]) for name, visual in visuals.items()]
    embedder = experiment.embedder(encoders)
    embed(experiment.processes.trainer, embedder, suite.batch_size, experiment.config.fit.workers)
    return {name: embedder.features(key, entry) for name, key in keys.items()}


def _images(experiment: Experiment, entry: EvaluationSet) -> Tensor:
    """Return the first images of a set, normalised, (n, 3, S, S) float32."""
    return experiment.towers.full.preprocess.normalize(pool_of(entry).batch(places_of(entry)[:IMAGES]))


def _require_narrow(encoder: nn.Module, form: str) -> None:
    """Raise UserError for a layer with weights of more than 7 bits, which ``form`` cannot multiply exactly on every CPU."""
    if wide := wide_layers(encoder):
        raise UserError(
            f"exact=true, and {len(wide)} layers have weights of more than 7 bits ('{wide[0]}'), whose products with inputs of "
            f"8 bits no instruction for {form} adds exactly on every CPU: make the run with quant.weight.bits=7, or give "
            "format=onnx."
        )


def _require_layers(found: list[LayerParity], integers: int, draft: Path, wide: list[str]) -> None:
    """Raise UserError for a layer whose output differs from the simulation's, and for layers that are computed in floats.

    ``wide`` names the layers with 8-bit weights, whose sums of products a CPU without VNNI cuts off; for these the
    message has a remedy.
    """
    if failed := [layer for layer in found if not layer.passed]:
        worst = max(failed, key=lambda layer: max(layer.product_error, layer.mismatch))
        why = f" {cpu()} has no VNNI and cuts off sums of products with 8-bit weights: {EXACT}." if lacks_vnni() else ""
        raise UserError(
            f"{len(failed)} of {len(found)} layers do not compute what the simulation does: '{worst.layer}' is "
            f"{worst.product_error:.1e} off with {worst.mismatch:.1e} of its input's codes changed (at most {LIMIT:g} each), "
            f"{'in integers' if worst.integer else 'and not in integers'}. {draft / 'parity.csv'} has every layer."
            f"{why if worst.layer in wide else ''}"
        )
    if integers != len(found):
        raise UserError(
            f"the runtime computes {integers} of {len(found)} layers in integers, the rest in floats: {draft} keeps the "
            "model. Another release of the runtime, or format=, may take them all."
        )


def _require_blocks(blocks: list[BlockParity], form: str, draft: Path) -> None:
    """Raise UserError, naming the first, for blocks whose output in the running model is not the simulation's."""
    if failed := [block for block in blocks if not block.passed]:
        first = failed[0]
        raise UserError(
            f"each layer alone computes what the simulation does, but in the running model '{first.block}' is "
            f"{first.error:.1e} off, where the simulation is {first.simulated:.1e} from full precision (at most {IN_PLACE:g} "
            f"times that): the runtime of format={form} fuses its operators wrongly. Choose another format=; "
            f"{draft / 'blocks.csv'} has every block."
        )


def _require_whole(of: str, measured: dict[str, EndToEnd], outside: list[str], draft: Path) -> None:
    """Raise UserError where features or metrics of the integer model are too far from those of the simulation.

    ``of`` is the first ID set. Only its features have to meet the limit, because on images of noise two correct
    programs are further apart. ``outside`` are sentences on metrics that differ too much.
    """
    first = measured[of]
    if not first.passed:
        raise UserError(
            f"the integer model's features of {of} are {first.integer:.1e} from the simulation's, which are "
            f"{first.simulated:.1e} from full precision: more than {FARTHEST:g} times as far. {draft} keeps it."
        )
    if outside:
        raise UserError(
            f"the integer model differs from the simulation by more than sampling explains: {'; '.join(outside[:3])}. "
            f"{draft} keeps it."
        )
