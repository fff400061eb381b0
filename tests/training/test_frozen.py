"""What does not change is computed once: the table of features, and the towers that fill it while a student trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from brief import BRIEF
from open_clip.transformer import VisionTransformer
from torch import Tensor

from qatlab.config import Config, ModelConfig
from qatlab.data.embedded.sets import EmbeddedSet
from qatlab.models import clip as clips
from qatlab.results.run import Run
from qatlab.training.frozen import CHUNK, FrozenFeatures
from qatlab.training.student import Student

Fit = Callable[..., Run]

# -- the table -------------------------------------------------------------------------------------------------------


class Counted:
    """Features of some samples, and a note of what was asked for."""

    def __init__(self, count: int) -> None:
        self.table = torch.randn(count, 5, generator=torch.Generator().manual_seed(count))
        self.asked: list[tuple[int, int]] = []

    def __call__(self, start: int, stop: int) -> Tensor:
        self.asked.append((start, stop))
        return self.table[start:stop]


@pytest.mark.parametrize("count", [1, 16, CHUNK - 1, CHUNK, CHUNK + 1, 100, 3 * CHUNK])
@pytest.mark.parametrize("seed", range(3))
def test_every_sample_is_computed_once_in_any_order(count: int, seed: int) -> None:
    compute, generator = Counted(count), torch.Generator().manual_seed(seed)
    known = FrozenFeatures(count, compute)
    for _ in range(2):
        for rows in torch.randperm(count, generator=generator).split(7):
            torch.testing.assert_close(known[rows], compute.table[rows], rtol=0, atol=0)
    computed = [sample for start, stop in compute.asked for sample in range(start, stop)]
    assert sorted(computed) == list(range(count))


def test_the_chunks_do_not_depend_on_what_is_asked_first() -> None:
    """A forward of other samples together may give other bits: a resumed run begins in the middle."""
    for rows in ([70], [3, 99, 40], [99, 0], list(range(100))):
        compute = Counted(100)
        assert FrozenFeatures(100, compute)[torch.tensor(rows)].shape == (len(rows), 5)
        chunks = {(start, min(100, start + CHUNK)) for start in range(0, 100, CHUNK)}
        assert set(compute.asked) == {chunk for chunk in chunks if any(chunk[0] <= row < chunk[1] for row in rows)}
        assert len(compute.asked) == len(set(compute.asked))


def test_rows_may_repeat() -> None:
    compute = Counted(40)
    known = FrozenFeatures(40, compute)
    rows = torch.tensor([39, 2, 39, 39, 2])
    assert torch.equal(known[rows], compute.table[rows])
    assert len(compute.asked) == 2


# -- in training -----------------------------------------------------------------------------------------------------


class Seen:
    """What the frozen towers were given inside training steps, and the module that trained."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.tokens: list[Tensor] = []
        self.batches: list[dict[str, Any]] = []
        self.module: Any = None
        self.training = False

    def distinct(self) -> int:
        return len({image.numpy().tobytes() for images in self.images for image in images})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    noted = Seen()
    step, forward, encode = Student.training_step, VisionTransformer.forward, open_clip.CLIP.encode_text

    def training_step(self: Student, batch: dict[str, Any], index: int) -> Tensor:
        noted.module, noted.training = self, True
        noted.batches.append(batch)
        left = step(self, batch, index)
        noted.training = False
        return left

    def visual(self: VisionTransformer, images: Tensor) -> Any:
        if noted.training and self is noted.module.clip.visual:
            noted.images.append(images.clone())
        return forward(self, images)

    def texts(self: open_clip.CLIP, tokens: Tensor, *args: Any, **options: Any) -> Any:
        if noted.training:
            noted.tokens.append(tokens.clone())
        return encode(self, tokens, *args, **options)

    monkeypatch.setattr(Student, "training_step", training_step)
    monkeypatch.setattr(VisionTransformer, "forward", visual)
    monkeypatch.setattr(open_clip.CLIP, "encode_text", texts)
    return noted


DISTILL = ["fit.steps=4", "fit.batch_size=8", "fit.eval_every=2", *BRIEF]


@pytest.mark.parametrize("at_once", ["null", "3"])
def test_looped_samples_pass_the_teacher_and_the_text_tower_once(
    small_fit: Fit, seen: Seen, tmp_path: Path, at_once: str
) -> None:
    small_fit("light_qat_distill", tmp_path, *DISTILL, "fit.unique_samples=16", f"fit.micro_batch={at_once}")
    assert len(seen.batches) == 4
    assert sum(len(batch["images"]) for batch in seen.batches) == 32
    assert sum(len(images) for images in seen.images) == seen.distinct() == 16
    assert sum(len(tokens) for tokens in seen.tokens) == 16
    samples = {image.numpy().tobytes() for batch in seen.batches for image in batch["images"]}
    assert len(samples) == 16
    for batch in seen.batches:  # and each image has its own features
        known = seen.module.batch_features.frozen(batch)
        with torch.no_grad():
            torch.testing.assert_close(
                known["teacher"], seen.module.batch_features.teacher(batch["images"]), rtol=0, atol=1e-6
            )
            fresh = seen.module.batch_features.texts(batch["tokens"])
        torch.testing.assert_close(known["captions"], fresh, rtol=0, atol=1e-6)


@pytest.mark.parametrize("at_once", ["null", "3"])
def test_streamed_images_pass_the_teacher_once_per_batch(
    small_fit: Fit, seen: Seen, tmp_path: Path, at_once: str
) -> None:
    small_fit("light_qat_distill", tmp_path, *DISTILL, "fit.unique_samples=null", f"fit.micro_batch={at_once}")
    sizes = [8] * 4 if at_once == "null" else [3, 3, 2] * 4
    assert [len(images) for images in seen.images] == sizes
    assert [len(tokens) for tokens in seen.tokens] == sizes
    assert torch.equal(
        torch.cat(seen.images),
        torch.cat([seen.module.preprocess.normalize(batch["images"]) for batch in seen.batches]),
    )


def test_no_teacher_runs_for_an_objective_without_one(small_fit: Fit, seen: Seen, tmp_path: Path) -> None:
    small_fit("light_qat_lsq_pc", tmp_path, "fit.unique_samples=null", *BRIEF)
    assert len(seen.batches) == 2
    assert seen.images == []


def test_a_teacher_in_bfloat16(small: Callable[..., Config]) -> None:
    clip = clips.load(ModelConfig())
    images = torch.stack([EmbeddedSet("id", 8)[i][0] for i in range(8)])
    found = {}
    for option in ("false", "true"):
        module = Student(small("light_qat_distill", f"fit.teacher_bf16={option}"), clip, clip.visual)
        assert module.batch_features is not None
        with torch.no_grad():
            found[option] = module.batch_features.teacher(images)
            with torch.autocast("cpu", torch.bfloat16):  # trainer.precision is the student's affair
                assert torch.equal(module.batch_features.teacher(images), found[option])
            plain = module.embed(images, clip.visual)
    assert torch.equal(found["false"], plain)
    assert found["true"].dtype == torch.float32
    assert not torch.equal(found["true"], plain)
    torch.testing.assert_close(found["true"], plain, rtol=0, atol=1e-2)
    torch.testing.assert_close(found["true"].norm(dim=1), torch.ones(8))
