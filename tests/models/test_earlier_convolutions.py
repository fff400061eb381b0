"""Convolutions are rounded: what earlier releases made of towers that have them is told apart, and read as it was made."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import _build_vision_tower
from torch import nn

from qatlab.config import ModelConfig, compose
from qatlab.config.blocks import factory
from qatlab.core.checksums import write_tensors
from qatlab.core.errors import UserError
from qatlab.models import clip as clips
from qatlab.models.architecture import architecture, architectures, has_convolutions
from qatlab.models.quantized import load_quantized, read_quantized, save_quantized
from qatlab.quant import calibrate, quantize
from qatlab.quant.layers.convert import layer_names
from qatlab.results.identity import run_id


def test_models_d1_towers_with_inner_convolutions_have_other_ids_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier releases left these convolutions in full precision: the same options made another model."""

    def ids(*options: str) -> list[str]:
        found = []
        for answer in (has_convolutions, lambda _: False):
            with monkeypatch.context() as patch:
                patch.setattr("qatlab.results.identity.has_convolutions", answer)
                found.append(run_id(compose(*options)))
        return found

    for name in ("RN50", "convnext_base", "MobileCLIP-B", "MobileCLIP2-S0", "ViTamin-S"):
        now, before = ids("recipe=ptq", f"model.name={name}", "model.quick_gelu=false")
        assert now != before
    for options in (["recipe=ptq"], ["recipe=ptq", "model.name=ViT-B-16-SigLIP"], ["recipe=fp32", "model.name=RN50"]):
        now, before = ids(*options, "model.quick_gelu=false")
        assert now == before


@pytest.mark.slow
def test_models_d1_which_architectures_have_inner_convolutions() -> None:
    """Of every kind of trunk that open_clip's architectures name, built without memory for its weights."""
    seen: set[str] = set()
    for name in architectures():
        found = architecture(name)
        assert found is not None
        vision = found["vision_cfg"]
        kind = vision.get("timm_model_name") or type(vision["layers"]).__name__
        if kind in seen:
            continue
        seen.add(kind)
        with torch.device("meta"):
            visual = _build_vision_tower(found["embed_dim"], vision)
        inner = [m for m in visual.modules() if isinstance(m, nn.Conv2d) and m.in_channels != 3]
        assert has_convolutions(name) == bool(inner), name
    assert len(seen) > 40


def test_models_d1_a_file_of_an_earlier_release_keeps_its_convolutions_and_batch_norms(tmp_path: Path) -> None:
    vision = {"image_size": 64, "timm_model_name": "fastvit_mci0", "timm_pool": "avg", "timm_proj": None}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "Convolutions-test.json").write_text(
        json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text})
    )
    open_clip.add_model_config(tmp_path / "Convolutions-test.json")
    look = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}
    config = ModelConfig("Convolutions-test", None, None, False, preprocess=look)
    quant = compose("recipe=ptq").quant
    visual = clips.load(config, from_scratch=True).visual
    module, images = copy.deepcopy(visual), torch.randn(2, 3, 64, 64)
    weight, act = (factory(block) for block in (quant.weight, quant.act))
    convolutions = [name for name in layer_names(module) if isinstance(module.get_submodule(name), nn.Conv2d)]
    quantize(module, weight, act, dict.fromkeys(convolutions))
    calibrate(module, [images])
    path = tmp_path / "quantized.safetensors"
    save_quantized(module, path, config, quant)
    tensors, about = read_quantized(path)
    assert about.pop("convolutions") is True
    with pytest.raises(UserError, match=r"(holds|lacks) the tensor trunk\."):
        load_quantized(path)
    write_tensors(path, tensors, {"qatlab": json.dumps(about)})
    assert torch.equal(load_quantized(path)(images), module.eval()(images))
