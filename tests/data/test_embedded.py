from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from qatlab.core.errors import UserError
from qatlab.data import CaptionModule, Preprocess
from qatlab.data.captions.batches import caption_ids
from qatlab.data.embedded import world
from qatlab.data.embedded.sets import BIASED, CLASS_NAMES, KINDS, EmbeddedSet, lesson, write_caption_shards
from qatlab.data.embedded.vocabulary import caption, tokenize
from qatlab.data.rendered import RenderedShards, RenderedStream


def images(kind: str, n: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.stack([image for image, _ in EmbeddedSet(kind, n, seed).__getitems__(list(range(n)))])


@pytest.mark.parametrize("kind", KINDS)
def test_sets_are_pure_functions_of_seed_and_index(kind: str) -> None:
    small, large = EmbeddedSet(kind, 12, seed=3), EmbeddedSet(kind, 40, seed=3)
    together = large.__getitems__([30, 11, 4])
    for (image, label), index in zip(together, (30, 11, 4), strict=True):
        assert image.dtype == torch.uint8
        assert image.shape == (3, 64, 64)
        assert torch.equal(image, large[index][0])
        assert label == (-1 if "ood" in kind else index % 16)
    assert torch.equal(together[1][0], small[11][0])
    assert not torch.equal(small[11][0], EmbeddedSet(kind, 12, seed=4)[11][0])


def test_a_loader_gives_the_same_images() -> None:
    loader = DataLoader(EmbeddedSet("id", 20), batch_size=8)
    assert torch.equal(torch.cat([batch for batch, _ in loader]), images("id", 20))
    assert sum(len(batch) for batch, _ in loader) == 20


def test_classes_and_scenes_are_balanced() -> None:
    for kind in ("id", "calibration", "fog"):
        found = EmbeddedSet(kind, 320)
        labels = [found.spec(i).shape for i in range(320)]
        assert [labels.count(name) for name in CLASS_NAMES] == [20] * 16
        usual = [found.spec(i).scene == world.usual_scene(labels[i]) for i in range(320)]
        assert sum(usual) == 160
    held_out = [EmbeddedSet("near_ood", 60).spec(i).shape for i in range(60)]
    assert all(held_out.count(name) == 10 for name in world.HELD_OUT_SHAPES)


def test_labels_name_what_is_shown() -> None:
    found = EmbeddedSet("id", 32)
    assert all(CLASS_NAMES[found[i][1]] == found.spec(i).shape for i in range(32))


def test_splits_are_disjoint() -> None:
    taken = [images("id", 96), images("calibration", 96), images("near_ood", 96)]
    taken.append(torch.from_numpy(world.render([lesson(i, 256, 0) for i in range(160, 256)])))
    taken.append(torch.from_numpy(world.render([world.draw(0, "captions", i) for i in range(96)])))
    distinct = {image.numpy().tobytes() for group in taken for image in group}
    assert len(distinct) == sum(len(group) for group in taken)


def test_shifted_sets_show_the_same_objects() -> None:
    plain = images("id").float()
    for kind in ("noise", "fog", "gray", "outline", "blur"):
        shifted = images(kind).float()
        assert (shifted != plain).flatten(1).any(dim=1).all()
        correlation = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(plain, shifted, strict=True)]
        assert np.median(correlation) > 0.6, kind
    noise = (images("noise").float() - plain)[(plain > 90) & (plain < 165)]
    assert noise.std() == pytest.approx(0.12 * 255, rel=0.05)
    with_pillow = np.asarray(Image.fromarray(images("id")[3].permute(1, 2, 0).numpy()).convert("L"), dtype=float)
    assert np.abs(0.8 * with_pillow + 0.2 * plain[3].numpy() - images("gray")[3].numpy()).max() <= 1


def test_usual_and_unusual_differ_in_the_scene_alone() -> None:
    usual, unusual = EmbeddedSet("usual", 64), EmbeddedSet("unusual", 64)
    for i in range(64):
        a, b = usual.spec(i), unusual.spec(i)
        assert a.scene == world.usual_scene(a.shape) != b.scene
        assert {**vars(a), "scene": ""} == {**vars(b), "scene": ""}
    mixed = images("id", 64)
    assert torch.equal(mixed[:16], images("usual", 64)[:16])
    assert torch.equal(mixed[16:32], images("unusual", 64)[16:32])


def test_far_images_hold_no_object() -> None:
    """The empty scenes equal the backgrounds; a double exposure is the mean of two of them."""
    far, found = images("far_ood", 30), EmbeddedSet("far_ood", 30)
    scenery = np.array([found.spec(0).scenery], np.float32)
    assert np.array_equal(far[0].numpy(), world.to_bytes(world.backgrounds([found.spec(0).scene], scenery))[0])
    scenes = [found.spec(2).scene, world.SCENE_NAMES[world.SCENE_NAMES.index(found.spec(2).scene) - 3]]
    scenery = np.array([found.spec(2).scenery, np.roll(found.spec(2).scenery, 1)], np.float32)
    both = world.backgrounds(scenes, scenery).mean(axis=0)
    assert np.abs(far[2].numpy() - 255 * both).max() <= 1


def test_unknown_kind_is_named() -> None:
    with pytest.raises(UserError, match=r"no set 'near_od'.*did you mean 'near_ood'"):
        EmbeddedSet("near_od", 10)
    with pytest.raises(IndexError):
        EmbeddedSet("id", 10)[10]


def rendered(workers: int, start: int = 0) -> list[dict]:
    data = RenderedStream("embedded_stream", steps=4, batch_size=16)
    preprocess = Preprocess(64, (0.5,) * 3, (0.25,) * 3)
    return list(CaptionModule(data, preprocess, tokenize, 16, None, workers, 5, 4, start).train_dataloader())


def test_stream_is_the_same_with_any_number_of_workers() -> None:
    alone, shared = rendered(0), rendered(2)
    assert [len(batch["caption_ids"]) for batch in alone] == [16] * 4
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one["images"], other["images"])
        assert torch.equal(one["labels"], other["labels"])
        assert torch.equal(one["tokens"], other["tokens"])
        assert torch.equal(one["caption_ids"], other["caption_ids"])
    assert torch.equal(rendered(0, start=2)[0]["images"], alone[2]["images"])
    specs = [lesson(i, 64, 5) for i in range(64)]
    assert torch.equal(tokenize([caption(spec) for spec in specs]), torch.cat([b["tokens"] for b in alone]))
    assert torch.equal(caption_ids([caption(spec) for spec in specs]), torch.cat([b["caption_ids"] for b in alone]))
    assert [CLASS_NAMES.index(spec.shape) for spec in specs] == torch.cat([b["labels"] for b in alone]).tolist()


def test_stream_is_divided_among_ranks() -> None:
    data = RenderedStream("embedded_stream", steps=2, batch_size=6)
    preprocess = Preprocess(64, (0.5,) * 3, (0.25,) * 3)
    keys = [[key for step in (0, 1) for key in data.batch(step, 6, rank, 2, preprocess, 5).keys] for rank in (0, 1)]
    assert keys == [[f"{i:09d}" for i in range(first, 12, 2)] for first in (0, 1)]


def test_fingerprint_tells_which_images_are_rendered() -> None:
    sizes = [(2, 6), (6, 2), (2, 6)]
    prints = [RenderedStream("embedded_stream", steps, batch).fingerprint() for steps, batch in sizes]
    assert prints[0] == prints[2] != prints[1]
    written = [RenderedShards("embedded", samples, 1).fingerprint() for samples in (8, 100, 8)]
    assert written[0] == written[2] != written[1]


def test_lessons_follow_the_curriculum() -> None:
    specs = [lesson(i, 4000, 1) for i in range(4000)]
    usual = np.array([spec.scene == world.usual_scene(spec.shape) for spec in specs])
    assert all(spec.scene == world.FLAT and spec.texture == "plain" for spec in specs[:1000])
    assert not any(spec.scene == world.FLAT for spec in specs[1000:])
    last = round(4000 * (1 - BIASED))
    assert usual[1000:last].mean() == pytest.approx(1 / 8, abs=0.03)
    assert usual[last:].mean() == pytest.approx(0.9, abs=0.05)


def test_shards_are_read_by_webdataset(tmp_path: Path) -> None:
    paths = write_caption_shards(tmp_path / "a", n=25, per_shard=10, seed=2)
    assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"]
    samples = list(webdataset.WebDataset([str(path) for path in paths], shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{i:06d}" for i in range(25)]
    for i, sample in enumerate(samples):
        spec = world.draw(2, "captions", i, usual=0.5)
        assert sample["txt"].decode() == caption(spec) == json.loads(sample["json"])["caption"]
        assert json.loads(sample["json"])["class"] == spec.shape
        decoded = np.asarray(Image.open(io.BytesIO(sample["jpg"])).convert("RGB")).transpose(2, 0, 1)
        assert np.abs(decoded.astype(int) - world.render([spec])[0]).mean() < 4


def test_shards_are_written_once_and_repeat(tmp_path: Path) -> None:
    first = write_caption_shards(tmp_path / "a", n=12, per_shard=8)
    again = write_caption_shards(tmp_path / "b", n=12, per_shard=8)
    assert [a.read_bytes() for a in first] == [b.read_bytes() for b in again]
    stamps = [path.stat().st_mtime_ns for path in first]
    write_caption_shards(tmp_path / "a", n=12, per_shard=8)
    assert [path.stat().st_mtime_ns for path in first] == stamps
    write_caption_shards(tmp_path / "a", n=12, per_shard=8, seed=1)
    assert first[0].read_bytes() != again[0].read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["00000.tar", "00001.tar", "world.json"]
