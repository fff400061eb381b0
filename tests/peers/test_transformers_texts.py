"""Text towers from transformers: quantized whole, equal to encode_text before rounding, smoothed where a factor passes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from texts import VISION, apart, realistic
from torch import Tensor

from qatlab.models.text_tower import TextTower
from qatlab.quant import (
    LSQ,
    MinMax,
    SmoothQuant,
    calibrate,
    full_precision,
    layer_report,
    quant_layers,
    quantize,
    verify,
)
from qatlab.quant.inspect.coverage import coverage
from qatlab.quant.layers.convert import layer_names

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
LENGTH, WORDS, LAYERS = 12, 60, 2
BERT = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
M2M = {
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
    **{f"{part}_layers": LAYERS for part in ("encoder", "decoder")},
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_heads": 4}
# transformers' configuration, its options, open_clip's pooling and projection as its architectures have them, and how
# many layers of a block SmoothQuant rewrites
FAMILIES: dict[str, tuple[str, dict[str, Any], str, str, int]] = {
    "roberta": ("RobertaConfig", {**BERT, "max_position_embeddings": 20, "pad_token_id": 1}, "mean_pooler", "mlp", 1),
    "xlm": ("XLMRobertaConfig", {**BERT, "max_position_embeddings": 20, "pad_token_id": 1}, "mean_pooler", "mlp", 1),
    "nllb": ("M2M100Config", {**M2M, "d_model": 32, "pad_token_id": 1}, "cls_pooler", "linear", 6),
    "mt5": ("MT5Config", {**T5, "pad_token_id": 0}, "mean_pooler", "mlp", 7),
}
IN_BLOCK = {"roberta": 6, "xlm": 6, "nllb": 6, "mt5": 7}
WEIGHT, ACT = partial(MinMax, 8, per_channel=True), partial(MinMax, 8)
BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="transformers is not installed: the extra 'peers'")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(transformers: Any, family: str, tmp_path: Path) -> Any:
    kind, options, pooling, projection, _ = FAMILIES[family]
    getattr(transformers, kind)(**options, vocab_size=WORDS).save_pretrained(tmp_path)
    text = {"hf_model_name": str(tmp_path), "hf_model_pretrained": False}
    text |= {"hf_pooler_type": pooling, "hf_proj_type": projection}
    torch.manual_seed(0)
    return realistic(open_clip.CustomTextCLIP(16, VISION, text)).eval()  # type: ignore[arg-type]


@pytest.fixture
def texts(family: str) -> Tensor:
    found = torch.randint(3, WORDS, (6, LENGTH), generator=torch.Generator().manual_seed(1))
    for row in range(5):
        found[row, 5 + row :] = FAMILIES[family][1]["pad_token_id"]
    return found


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@torch.no_grad()
def test_before_rounding_it_is_encode_text(model: Any, texts: Tensor, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    exact = model.encode_text(texts)
    tower = TextTower(model)
    quantize(tower, WEIGHT, ACT, final_proj=True)
    with full_precision(tower):
        assert apart(tower(texts), exact) < BOUND[dtype]


def test_every_product_is_rounded(model: Any, texts: Tensor, family: str) -> None:
    tower = TextTower(model)
    names = layer_names(tower, final_proj=True)
    assert len(names) == IN_BLOCK[family] * LAYERS + (2 if FAMILIES[family][3] == "mlp" else 1)
    quantize(tower, WEIGHT, ACT, final_proj=True)
    assert coverage(tower, texts[:1], {}).shares["product_share"] == 1
    calibrate(tower, [texts])
    assert {row["layer"] for row in verify(tower, texts)} == set(names)
    assert [row["layer"] for row in layer_report(tower, texts)] == names
    assert 0 < apart(tower.eval()(texts), model.encode_text(texts)) < 0.5


@torch.no_grad()
def test_smoothquant_is_exact_where_a_factor_passes(model: Any, texts: Tensor, family: str) -> None:
    model = model.double()
    rewrite = SmoothQuant()
    tower = rewrite(TextTower(model), [texts[:4], texts[4:]])
    # T5's norms compute in float32, whatever the dtype of the model
    assert apart(tower(texts), model.encode_text(texts)) < (1e-6 if family == "mt5" else 1e-10)
    assert len(rewrite.alphas) == FAMILIES[family][4] * LAYERS
    before, after = TextTower(model).state_dict(), tower.state_dict()
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[f"{name}.weight"], after[f"{name}.weight"]) for name in rewrite.alphas)


def test_two_steps_reach_every_learned_thing(model: Any, texts: Tensor) -> None:
    exact = model.encode_text(texts).detach()
    tower, lsq = TextTower(model), partial(LSQ, 4)
    quantize(tower, partial(lsq, per_channel=True), lsq, final_proj=True)
    calibrate(tower, [texts])
    # dropout would let some rows of a table go without a gradient by chance
    learned = {name: part for name, part in tower.eval().named_parameters() if not name.startswith("text.logit_")}
    assert sum("quantizer" in name for name in learned) == 2 * len(quant_layers(tower))
    optimizer = torch.optim.Adam(learned.values(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        (1 - torch.cosine_similarity(tower(texts), exact)).mean().backward()
        assert [name for name, part in learned.items() if part.grad is None or not part.grad.any()] == []
        optimizer.step()
