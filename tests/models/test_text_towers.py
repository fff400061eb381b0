"""Text towers of other families as a run makes, stores and reads them: by the functions of models.quantized."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
from texts import FAMILIES, apart, build, config, tokens

from qatlab.config import ModelConfig, compose
from qatlab.core.checksums import write_tensors
from qatlab.core.errors import UserError
from qatlab.models.clip import untrained
from qatlab.models.quantized import (
    fitted_text,
    load_quantized,
    quantized_text,
    read_quantized,
    save_quantized,
    stored_text,
)
from qatlab.models.zeroshot import encode_text
from qatlab.quant import quant_layers, verify
from qatlab.results.identity import identity, run_id

LOOK = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}


def model_of(family: str, folder: Path) -> tuple[ModelConfig, Any]:
    name = f"Texts-{list(FAMILIES).index(family)}"  # by a name with "SigLIP" open_clip would look for its tokenizer
    (folder / f"{name}.json").write_text(json.dumps(config(family)))
    open_clip.add_model_config(folder / f"{name}.json")
    options = ModelConfig(name, preprocess=LOOK)
    torch.manual_seed(0)
    return options, untrained(options)[0].eval()


@pytest.mark.parametrize("rewrite", ["null", "smoothquant", "rotation"])
@pytest.mark.parametrize("family", ["CLIP", "SigLIP", "MobileCLIP2", "PE-Core", "CoCa"])
def test_models_d7_a_stored_text_tower_computes_what_it_did(family: str, rewrite: str, tmp_path: Path) -> None:
    options, model = model_of(family, tmp_path)
    choices = [f"quant/rewrite={rewrite}"] if rewrite != "null" else []
    quant = compose("recipe=ptq", "quant.tower=text", "quant.last=true", *choices).quant
    texts = tokens(family)
    tower, planned = fitted_text(model, quant, lambda: texts.split(3))
    assert planned == quant
    verify(tower, texts)
    path = tmp_path / "text.safetensors"
    save_quantized(tower, path, options, planned)
    found = load_quantized(path)
    assert torch.equal(found(texts), tower.eval()(texts))
    assert apart(found(texts), model.encode_text(texts).detach()) < 0.5
    assert list(found.state_dict()) == list(quantized_text(model, quant).state_dict())


@pytest.mark.parametrize("rewrite", ["smoothquant", "rotation"])
@pytest.mark.parametrize("family", FAMILIES)
def test_class_prompts_go_through_the_quantized_tower(family: str, rewrite: str) -> None:
    """Texts of a causal tower are cut behind their ends, in tables that a rotation has rewritten too."""
    model, texts = build(family), tokens(family)
    quant = compose("recipe=ptq", "quant.tower=text", f"quant/rewrite={rewrite}").quant
    tower, _ = fitted_text(model, quant, lambda: texts.split(3))
    clip: Any = SimpleNamespace(model=tower.eval().text, tokenizer=lambda _: texts, text_calls=0)
    found = encode_text(clip, [""] * len(texts), batch_size=2)
    with torch.no_grad():
        assert apart(found, torch.nn.functional.normalize(tower(texts), dim=-1)) < 1e-5


@pytest.mark.parametrize("family", ["CLIP", "SigLIP", "CoCa"])
def test_the_bits_of_a_text_tower_are_planned_and_read_back(family: str, tmp_path: Path) -> None:
    options, model = model_of(family, tmp_path)
    quant = compose("recipe=mixed_precision", "quant.tower=text", "+quant.rules={text.*.0.*.c_fc: null}").quant
    texts = tokens(family)
    tower, planned = fitted_text(model, quant, lambda: texts.split(3))
    layers = quant_layers(tower)
    assert set(planned.rules) == {"text.*.0.*.c_fc", *layers}
    assert not any(name.endswith(".0.mlp.c_fc") for name in layers)
    save_quantized(tower, tmp_path / "text.safetensors", options, planned)
    found = quant_layers(load_quantized(tmp_path / "text.safetensors"))
    bits = [{name: layer.weight_quantizer.bits for name, layer in of.items()} for of in (layers, found)]  # type: ignore[union-attr]
    assert bits[0] == bits[1]
    assert len(set(bits[0].values())) > 1


def test_of_an_earlier_release_the_text_tower_was_neither_rewritten_nor_projected(tmp_path: Path) -> None:
    options, model = model_of("CLIP", tmp_path)
    texts, path = tokens("CLIP"), tmp_path / "text.safetensors"
    today = ["recipe=ptq", "quant.tower=both", "quant/rewrite=smoothquant", "quant.last=true"]
    earlier = compose("recipe=ptq", "quant.tower=both").quant
    tower = fitted_text(model, earlier, lambda: [texts])[0]
    save_quantized(tower, path, options, compose(*today).quant)
    tensors, about = read_quantized(path)
    with pytest.raises(UserError, match=r"(holds|lacks) the tensor text\."):
        load_quantized(path)
    del about["text like images"]
    write_tensors(path, tensors, {"qatlab": json.dumps(about)})
    assert torch.equal(load_quantized(path)(texts), tower.eval()(texts))
    assert "text.text_projection" not in quant_layers(stored_text(model, about))


def test_runs_that_now_mean_the_text_tower_too_are_other_runs() -> None:
    for option in ("quant/rewrite=smoothquant", "quant/plan=mixed_precision", "quant.last=true"):
        # an option of a plan without a default is given, so that the options are whole
        given = [option, *(["quant.plan.average_bits=4"] if "plan" in option else [])]
        config = compose("recipe=ptq", "quant.tower=both", *given)
        assert identity(config)["text tower"] == "like the image tower"
        assert "text tower" not in identity(compose("recipe=ptq", *given))
    plain = identity(compose("recipe=ptq", "quant.tower=both"))
    assert "text tower" not in plain
    assert run_id(compose("recipe=ptq", "quant.tower=both")) != run_id(compose("recipe=ptq"))


def test_a_text_tower_reads_no_image(tmp_path: Path) -> None:
    _, model = model_of("CLIP", tmp_path)
    quant = compose("recipe=ptq", "quant.tower=both", "quant.first=true").quant
    assert len(quant_layers(quantized_text(model, quant))) == 8
    with pytest.raises(UserError, match=r"quant\.first is for the image tower, which quant\.tower=text leaves"):
        quantized_text(model, compose("recipe=ptq", "quant.tower=text", "quant.first=true").quant)
