"""The quantizing stage of a run: the towers calibrated, or read back, every quantizer checked, what they lose written."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import polars as pl
import torch
from torch import Tensor, nn

from qatlab.config import QuantConfig
from qatlab.quant import calibrate, layer_report, quant_layers, verify
from qatlab.quantized import (
    QUANTIZED,
    TEXT,
    fitted_copy,
    is_quantized,
    quantized_copy,
    quantized_text,
    read_quantized,
    save_quantized,
)
from qatlab.text import class_drift

if TYPE_CHECKING:
    from qatlab.study import Study

REPORT_SAMPLES = 16  # samples that layers.csv and the count of distinct values are measured on


def quantize_towers(study: Study) -> None:
    """Put the quantized towers in place of those of ``study``; writes layers.csv, and class_drift.csv of a text tower."""
    config = study.config.quant
    report: list[dict[str, Any]] = []
    fitted: dict[str, nn.Module] = {}  # in this process, by the file they go to
    if is_quantized(config, "visual"):
        if (stored := study.run.folder / QUANTIZED).exists():
            tensors, about = read_quantized(stored)
            study.fitted = QuantConfig(**about["quant"])
            study.module.visual = quantized_copy(study.clip.visual, study.fitted)
            study.module.visual.load_state_dict(tensors)
        else:
            images = _fit_image_tower(study)
            report += _report(study.module.visual, images)
            fitted[QUANTIZED] = study.module.visual
    if is_quantized(config, "text"):
        assert study.clip.model is not None
        tower = quantized_text(study.clip.model, config)
        if (stored := study.run.folder / TEXT).exists():
            tower.load_state_dict(read_quantized(stored)[0])
        else:
            report += _report(tower, _fit_text_tower(study, tower))
            fitted[TEXT] = tower
        study.scored_clip = replace(study.clip, model=tower.text.to(_device(study)).eval(), text_calls=0)
        _move_classes(study)
    if report:
        study.write("layers.csv", lambda path: pl.DataFrame(report, infer_schema_length=None).write_csv(path))
    # Last: once the towers are stored the stage is finished.
    for name, module in fitted.items():
        study.write(name, lambda path, module=module: save_quantized(module, path, study.config.model, study.fitted))


def _fit_image_tower(study: Study) -> Tensor:
    """Quantize and calibrate the student; returns the first of its images."""
    config, device = study.config.quant, _device(study)
    study.say(f"calibrating on {config.calibration_images} images of {study.data.name}")
    images = study.clip.preprocess.normalize(study.captioned().images[: config.calibration_images])

    def batches() -> Any:
        return (chunk.to(device) for chunk in images.split(study.config.suite.batch_size))

    study.module.visual, study.fitted = fitted_copy(study.clip.visual.to(device), config, batches)
    if config.plan is not None:
        study.say(f"  {planned_bits(study.module.visual)}")
    return images[:REPORT_SAMPLES].to(device)


def _fit_text_tower(study: Study, tower: nn.Module) -> Tensor:
    """Calibrate the text tower; returns the first of its tokens."""
    assert study.clip.tokenizer is not None
    captions = study.captioned().captions[: study.config.quant.calibration_images]
    study.say(f"calibrating the text tower on {len(captions)} captions of {study.data.name}")
    tokens: Tensor = study.clip.tokenizer(captions).to(_device(study))
    calibrate(tower.to(tokens.device), tokens.split(study.config.suite.batch_size))
    return tokens[:REPORT_SAMPLES]


def _move_classes(study: Study) -> None:
    """Score against the quantized tower's class embeddings from here on; their drift is written, and told."""
    study.module.encode_classes(study.scored_clip)
    table = pl.concat(
        class_drift(head.classes, study.module.heads[reference].classes).with_columns(
            pl.lit(reference).alias("reference")
        )
        for reference, head in study.suite.heads.items()
    )
    study.write("class_drift.csv", lambda path: table.write_csv(path))
    cosines: list[float] = table["cosine"].to_list()
    study.drift = {"class_cosine_mean": sum(cosines) / len(cosines), "class_cosine_min": min(cosines)}
    study.say(
        "  class embeddings: cosine to those of the full-precision text tower "
        f"{study.drift['class_cosine_mean']:.4f} on average, least {min(cosines):.4f} "
        f"({table['class'][cosines.index(min(cosines))]})"
    )


def _device(study: Study) -> torch.device:
    return study.trainer.strategy.root_device


def _report(model: nn.Module, few: Tensor) -> list[dict[str, Any]]:
    verify(model, few)
    return layer_report(model, few)


def planned_bits(model: nn.Module) -> str:
    """Return a line on the bits of the weights: "bits of the weights: 4 in 30 layers, 8 in 18; 4.61 on average"."""
    quantizers = [layer.weight_quantizer for layer in quant_layers(model).values() if layer.weight_quantizer]
    counts = Counter(quantizer.bits for quantizer in quantizers)
    shown = ", ".join(f"{bits} in {count}" for bits, count in sorted(counts.items()))
    return f"bits of the weights: {shown} layers; {average_bits(model):.2f} on average"


def average_bits(model: nn.Module) -> float:
    """Return the mean number of bits per quantized weight."""
    layers = [layer for layer in quant_layers(model).values() if layer.weight_quantizer is not None]
    sizes = [layer.weight.numel() for layer in layers]
    bits = [layer.weight_quantizer.bits for layer in layers if layer.weight_quantizer is not None]
    return sum(size * b for size, b in zip(sizes, bits, strict=True)) / sum(sizes)
