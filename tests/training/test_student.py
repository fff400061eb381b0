"""What is trained, at which rate, by which gradient; and what stops a run that went wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from qatlab.config import Config, ModelConfig
from qatlab.core.errors import UserError
from qatlab.data.embedded.sets import CLASS_NAMES, EmbeddedSet
from qatlab.models import clip as clips
from qatlab.models.clip import Clip
from qatlab.models.quantized import quantized_copy
from qatlab.models.zeroshot import class_features
from qatlab.quant import LSQ, Quantizer, calibrate
from qatlab.suites.heads import Head
from qatlab.training.student import MAX_LEARNED_SCALE, Student

Options = Callable[..., Config]


@pytest.fixture
def clip() -> Clip:
    return clips.load(ModelConfig())


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    images = torch.stack([EmbeddedSet("id", 8)[i][0] for i in range(8)])
    captions = [f"a photo of a {CLASS_NAMES[i % 5]}" for i in range(8)]
    tokens = clips.load(ModelConfig()).tokenizer(captions)
    ids = torch.tensor([i % 5 for i in range(8)])
    return {"images": images, "caption_ids": ids, "tokens": tokens, "labels": torch.arange(8), "skipped": {}}


@pytest.fixture
def student(small: Options, clip: Clip, batch: dict[str, Any]) -> Callable[..., Student]:
    """``student(*overrides, bank=None)``: a calibrated LSQ student with per-channel weight scales, ready to train."""

    def build(*overrides: str, bank: Tensor | None = None) -> Student:
        config = small("light_qat_lsq_pc", *overrides)
        visual = quantized_copy(clip.visual, config.quant)
        calibrate(visual, [clip.preprocess.normalize(batch["images"])])
        return Student(config, clip, visual, bank)

    return build


def train(module: Student, batch: dict[str, Any], steps: int = 1, *callbacks: L.Callback) -> dict[str, float]:
    """Train on one batch again and again; returns what was logged last."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, DataLoader([batch] * steps, batch_size=None))  # type: ignore[arg-type]
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning", "ignore::FutureWarning:lightning")

# -- embedding -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_embed_gives_unit_features_of_the_normalised_pixels(clip: Clip, small: Options, batch: dict[str, Any]) -> None:
    module = Student(small("fp32"), clip, clip.visual)
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (clip.preprocess.mean, clip.preprocess.std))
    pixels = (batch["images"].numpy() / 255 - mean) / std
    raw = clip.visual(torch.from_numpy(pixels).float()).double()
    found = module.embed(batch["images"])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), raw / raw.square().sum(1, keepdim=True).sqrt(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(8))


# -- optimizer -------------------------------------------------------------------------------------------------------


def test_weights_vectors_and_scales_have_their_own_rates(student: Callable[..., Student]) -> None:
    module = student("fit.lr=1e-5", "optim.scale_lr=2e-3", "optim.weight_decay=0.1", "optim.betas=[0.8,0.95]")
    optimizer = module.configure_optimizers()["optimizer"]
    found = {g["name"]: (g["lr"], g["weight_decay"], g["betas"]) for g in optimizer.param_groups}
    assert found == {
        "weights": (1e-5, 0.1, (0.8, 0.95)),
        "vectors": (1e-5, 0.0, (0.8, 0.95)),
        "scales": (2e-3, 0.0, (0.8, 0.95)),
    }
    names = {parameter: name for name, parameter in module.visual.named_parameters()}
    groups = {g["name"]: [names[p] for p in g["params"]] for g in optimizer.param_groups}
    assert sorted(name for group in groups.values() for name in group) == sorted(names.values())
    quantizers = [f"{name}." for name, layer in module.visual.named_modules() if isinstance(layer, Quantizer)]
    assert all(name.startswith(tuple(quantizers)) for name in groups["scales"])
    assert len(groups["scales"]) == len(quantizers) == 32
    assert all(dict(module.visual.named_parameters())[name].ndim >= 2 for name in groups["weights"])
    assert "ln_post.bias" in groups["vectors"]


def test_every_group_is_in_the_models_order(student: Callable[..., Student]) -> None:
    """AdamW's moments are stored by position: a process that resumes must come to the same order."""
    module = student()
    order = list(module.visual.parameters())
    place = {parameter: i for i, parameter in enumerate(order)}
    for group in module.configure_optimizers()["optimizer"].param_groups:
        places = [place[parameter] for parameter in group["params"]]
        assert places == sorted(places)


def test_minmax_has_no_scales_to_learn(small: Options, clip: Clip) -> None:
    config = small("light_qat")
    module = Student(config, clip, quantized_copy(clip.visual, config.quant))
    assert [g["name"] for g in module.configure_optimizers()["optimizer"].param_groups] == ["weights", "vectors"]


def rates(module: Student, steps: int) -> np.ndarray:
    """The rate of every group at every step, relative to its first."""
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    assert configured["lr_scheduler"]["interval"] == "step"
    found = []
    for _ in range(steps):
        found.append([g["lr"] / g["initial_lr"] for g in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return np.array(found)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_schedule(student: Callable[..., Student], schedule: str, warmup: int) -> None:
    module = student("fit.steps=20", f"fit.schedule={schedule}", f"fit.warmup={warmup}")
    expected = []
    for step in range(20):
        rate = 1.0
        if warmup:
            rate = min(rate, (step + 1) / warmup)
        if schedule == "cosine" and step > warmup:
            rate *= (1 + math.cos(math.pi * (step - warmup) / (20 - warmup))) / 2
        expected.append(rate)
    np.testing.assert_allclose(rates(module, 20), np.array(expected)[:, None].repeat(3, axis=1), rtol=1e-9)


def test_an_unknown_schedule_is_refused(student: Callable[..., Student]) -> None:
    with pytest.raises(UserError, match=r"fit\.schedule=cosin .*did you mean 'cosine'"):
        student("fit.schedule=cosin")


# -- gradient --------------------------------------------------------------------------------------------------------


def test_only_the_student_moves(student: Callable[..., Student], clip: Clip, batch: dict[str, Any]) -> None:
    module = student("fit.lr=1e-3", "objective.kl=1", "objective.feature_mse=1")
    before = copy.deepcopy(clip.model.state_dict())  # type: ignore[union-attr]
    start = copy.deepcopy(module.visual.state_dict())
    logged = train(module, batch, 2)
    assert {"train/contrastive", "train/kl", "train/feature_mse", "train/loss"} <= set(logged)
    assert all(parameter.grad is None for parameter in clip.model.parameters())  # type: ignore[union-attr]
    assert all(torch.equal(before[name], value) for name, value in clip.model.state_dict().items())  # type: ignore[union-attr]
    moved = [name for name, value in module.visual.state_dict().items() if not torch.equal(start[name], value)]
    assert {"proj", "conv1.weight", "transformer.resblocks.0.attn.in_proj.weight"} <= set(moved)
    scales = {n: q for n, q in module.visual.named_modules() if isinstance(q, LSQ)}
    assert all(any(name.startswith(f"{quantizer}.") for name in moved) for quantizer in scales)


def test_the_loss_is_the_objectives_formula_on_these_features(
    student: Callable[..., Student], clip: Clip, batch: dict[str, Any]
) -> None:
    bank = normalize(torch.randn(9, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    for texts in (bank, None):
        module = student("objective.contrastive=0", "objective.kl=1", bank=texts)
        with torch.no_grad():
            own, teacher = module.embed(batch["images"]), module.embed(batch["images"], clip.visual)
            read = normalize(clip.model.encode_text(batch["tokens"]), dim=-1) if texts is None else texts  # type: ignore
        p, q = ((clip.logit_scale * f.double() @ read.double().T).softmax(1) for f in (teacher, own))
        logged = train(module, batch)
        # the unquantized random start may be so close to its student that the loss is the rounding of float32
        assert logged["train/kl"] == pytest.approx(float((p * (p.log() - q.log())).sum(1).mean()), rel=1e-3, abs=1e-6)
        assert logged["train/loss"] == logged["train/kl"]


def test_both_towers_learn_from_scratch(small: Options, batch: dict[str, Any]) -> None:
    config = small("pretrain_tiny", "trainer.precision=32-true")
    torch.manual_seed(0)
    clip = clips.load(config.model, from_scratch=True)
    module = Student(config, clip, clip.visual)
    module.class_tokens = clip.tokenizer([f"a photo of a {name}" for name in CLASS_NAMES])  # type: ignore[misc]
    model: Any = clip.model
    start = copy.deepcopy(model.state_dict())
    model.logit_scale.data.fill_(10.0)
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert sum(len(group["params"]) for group in groups) == len(names)
    train(module, batch, 1)
    moved = [name for name, value in model.state_dict().items() if not torch.equal(start[name], value)]
    assert {"visual.proj", "text_projection", "token_embedding.weight"} <= set(moved)
    assert module.logit_scale == MAX_LEARNED_SCALE


def test_a_trained_text_tower_is_read_anew_in_every_pass(small: Options) -> None:
    config = small("pretrain_tiny")
    clip = clips.load(config.model, from_scratch=True)
    module = Student(config, clip, clip.visual)
    templates = config.suite.templates
    module.heads = {"id": Head(class_features(clip, CLASS_NAMES, templates, cache=False), tuple(templates))}
    before = module.heads["id"].classes.features
    clip.model.text_projection.data.mul_(-1)  # type: ignore[union-attr, operator]
    module.on_validation_start()
    torch.testing.assert_close(module.heads["id"].classes.features, -before)


# -- what goes wrong -------------------------------------------------------------------------------------------------


class Poison(L.Callback):
    """Puts a value into one weight before a step."""

    def __init__(self, layer: str, step: int, value: float) -> None:
        self.layer, self.step, self.value = layer, step, value

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            pl_module.visual.get_submodule(self.layer).weight.data[0, 0] = self.value


@pytest.mark.parametrize(
    ("layer", "step", "value"),
    [
        ("transformer.resblocks.1.mlp.c_fc", 0, float("nan")),
        ("transformer.resblocks.2.attn.in_proj", 2, float("nan")),
        ("conv1", 1, float("inf")),
    ],
)
def test_a_loss_that_is_not_finite_stops_with_step_and_layer(
    student: Callable[..., Student], batch: dict[str, Any], layer: str, step: int, value: float
) -> None:
    sentence = rf"the loss is nan at step {step}; the first layer .* is {layer}(\.weight_quantizer)?\. Lower fit\.lr"
    with pytest.raises(UserError, match=sentence):
        train(student(), batch, 4, Poison(layer, step, value))


def test_an_unquantized_student_is_watched_too(small: Options, clip: Clip, batch: dict[str, Any]) -> None:
    module = Student(small("fp32", "fit.steps=2", "objective.contrastive=1"), clip, copy.deepcopy(clip.visual))
    with pytest.raises(UserError, match=r"at step 1; .* is transformer\.resblocks\.3\.mlp\.c_proj\."):
        train(module, batch, 2, Poison("transformer.resblocks.3.mlp.c_proj", 1, float("nan")))


def image_only(clip: Clip) -> Clip:
    clip.model = None
    return clip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"objective\.contrastive needs a text tower.*objective\.feature_mse or objective\.kl.*data\.text_bank"),
        (["objective.contrastive=0", "objective.kl=1"], r"objective\.kl needs texts.*data\.text_bank="),
    ],
)
def test_an_objective_without_its_texts_names_the_alternatives(
    small: Options, clip: Clip, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Student(small("light_qat", *overrides), image_only(clip), nn.Identity())


@pytest.mark.parametrize("objective", ["objective.kl=1", "objective.feature_mse=1"])
def test_what_an_image_tower_alone_can_learn_by(small: Options, clip: Clip, objective: str) -> None:
    bank = torch.eye(64)
    Student(small("light_qat", "objective.contrastive=0", objective), image_only(clip), nn.Identity(), bank)


def test_class_prompts_need_labels(small: Options, clip: Clip) -> None:
    with pytest.raises(UserError, match=r"objective\.class_cross_entropy needs labelled"):
        Student(small("light_qat", "objective.class_cross_entropy=1"), clip, nn.Identity())
