"""The embedding pass: how often images are decoded and encoders run, what an interruption leaves, the same bits on any ranks."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from qatlab.config import ModelConfig, SetConfig, SuiteConfig
from qatlab.core.errors import UserError
from qatlab.data.images.imageset import ImageSet
from qatlab.data.preprocess import Preprocess
from qatlab.data.storage.decoded import DecodedImages
from qatlab.evaluation.embedding import Embedder, Encoder, Local, Work, embed
from qatlab.metrics.glmcm import local_mcm
from qatlab.models import clip as clips
from qatlab.models.clip import Clip
from qatlab.models.patches import with_patches
from qatlab.stages.processes import Processes
from qatlab.suites.pools import places_of, pool_of
from qatlab.suites.suite import EvaluationSet, build_suite

NAMES = ["circle", "square", "star"]
PER_CLASS = 8
EVERY = list(range(len(NAMES) * PER_CLASS))
NOISY = 6
BATCH = 4


class Tower(nn.Module):
    """A made-up image tower that counts the images of its forwards, and fails on the forward number ``fails_at``."""

    def __init__(self, seed: int = 0, fails_at: int | None = None, error: BaseException | None = None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(192, 8))
        self.seen: list[int] = []
        self.fails_at, self.error = fails_at, error or RuntimeError("struck")

    def forward(self, images: Tensor) -> Tensor:
        if len(self.seen) == self.fails_at:
            raise self.error
        self.seen.append(len(images))
        return self.layers(images)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return clips.load(ModelConfig())


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``shapes``: three class folders of eight images."""
    root = tmp_path_factory.mktemp("root")
    draw = np.random.default_rng(0)
    for name in NAMES:
        (root / "shapes" / name).mkdir(parents=True)
        for i in range(PER_CLASS):
            Image.fromarray(draw.integers(0, 256, (70, 64, 3), np.uint8)).save(root / "shapes" / name / f"{i}.png")
    return root


@pytest.fixture
def root(tree: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tree, tmp_path / "root"))


def sets(clip: Clip, root: Path, **given: SetConfig) -> list[EvaluationSet]:
    """The even and the odd images of the tree in two roles, and six of them corrupted: 24 + 6 images."""
    noise = {"name": "gaussian_noise", "severity": 3}
    given = given or {
        "even": SetConfig("shapes", "id", pick="0::2"),
        "odd": SetConfig("shapes", "calibration", pick="1::2"),
        "outside": SetConfig("shapes", "far_ood", pick="2:12"),
        "noisy": SetConfig("shapes", "shifted", pick=f":{NOISY}", corruption=noise),
    }
    rendered = all(str(entry.path).startswith("embedded:") for entry in given.values())
    names = None if rendered else NAMES  # rendered sets show all classes of the embedded world
    return build_suite(SuiteConfig(sets=given, class_names=names, root=str(root), images=20), clip).sets


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often each image was decoded, by corruption and place."""
    counted: Counter[tuple[str, int]] = Counter()
    at = ImageSet.at

    def counting(self: ImageSet, place: int) -> Tensor:
        counted[self.corruption.name if self.corruption else "", place] += 1
        return at(self, place)

    monkeypatch.setattr(ImageSet, "at", counting)
    return counted


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qatlab.evaluation.embedding.SHARD", 2 * BATCH)


Drive = Callable[[Embedder], Work]


def by_hand(embedder: Embedder, rank: int = 0, world: int = 1, workers: int = 0) -> Work:
    with torch.no_grad():
        for number, loader in enumerate(embedder.loaders(BATCH, workers, rank, world)):
            for index, batch in enumerate(loader):
                embedder.predict_step(batch, index, number)
    return embedder.counts


def by_trainer(embedder: Embedder, workers: int = 0) -> Work:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    return embed(trainer, embedder, BATCH, workers)


@pytest.fixture(params=[by_hand, by_trainer], ids=["by_hand", "by_trainer"])
def drive(request: pytest.FixtureRequest) -> Drive:
    return request.param


@pytest.fixture
def encoder(clip: Clip, root: Path) -> Callable[..., Encoder]:
    """``encoder("key", tower)`` for all the sets, or those that are given."""

    def make(key: str, tower: nn.Module, of: list[EvaluationSet] | None = None, **more: Any) -> Encoder:
        return Encoder(key, tower, clip.preprocess, sets(clip, root) if of is None else of, **more)

    return make


def files(store: Path) -> list[Path]:
    return sorted(store.rglob("*.safetensors"))


# -- how often -------------------------------------------------------------------------------------------------------


def test_every_image_is_decoded_once_and_every_encoder_sees_it_once(
    encoder: Any, decoded: Counter[Any], drive: Drive, tmp_path: Path
) -> None:
    one, other = Tower(0), Tower(1)
    embedder = Embedder([encoder("one", one), encoder("other", other)], tmp_path / "store")
    assert embedder.images == len(EVERY) + NOISY
    assert drive(embedder) == Work(30, {"one": 30, "other": 30})
    assert decoded == {**{("", place): 1 for place in EVERY}, **{("gaussian_noise", i): 1 for i in range(NOISY)}}
    assert one.seen == other.seen == [4] * 6 + [4, 2]


def test_what_is_there_is_never_computed_again(
    encoder: Any, decoded: Counter[Any], drive: Drive, tmp_path: Path
) -> None:
    tower = Tower()
    drive(Embedder([encoder("one", tower)], tmp_path))
    decoded.clear()
    tower.seen.clear()
    again = Embedder([encoder("one", tower)], tmp_path)
    assert (again.images, again.work) == (0, {})
    assert drive(again) == Work(0, {"one": 0})
    assert (sum(decoded.values()), tower.seen) == (0, [])


def test_images_that_are_kept_are_decoded_once_for_encoders_that_come_later(
    encoder: Any, decoded: Counter[Any], drive: Drive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has nothing else in common with this one: its pass finds the pixels on disk, the very same."""
    monkeypatch.setenv("QATLAB_CACHE", str(tmp_path / "cache"))
    assert drive(Embedder([encoder("one", Tower(0))], tmp_path / "store", keep=True)).decoded == 30
    decoded.clear()
    later = Embedder([encoder("other", Tower(1))], tmp_path / "store", keep=True)
    assert drive(later) == Work(0, {"other": 30})
    assert not decoded
    plain = Embedder([encoder("other", Tower(1))], tmp_path / "plain")
    drive(plain)
    for entry in later.encoders[0].sets:
        assert torch.equal(later.features("other", entry), plain.features("other", entry))


def test_a_kept_image_whose_file_is_another_now_is_decoded_anew(
    encoder: Any, decoded: Counter[Any], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QATLAB_CACHE", str(tmp_path / "cache"))
    by_hand(Embedder([encoder("one", Tower(0))], tmp_path / "store", keep=True))
    decoded.clear()
    changed = root / "shapes" / NAMES[0] / "0.png"
    Image.fromarray(np.zeros((70, 64, 3), np.uint8)).save(changed)
    os.utime(changed, (1, 1))
    found = by_hand(Embedder([encoder("other", Tower(1))], tmp_path / "store", keep=True))
    assert found.decoded == sum(decoded.values()) == 2  # as it is and corrupted


@pytest.mark.parametrize("keep", [False, True])
def test_data_w1_other_pixels_under_the_same_names_get_features_of_their_own(
    clip: Clip, encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    """Clean and noisy images stored, so that all files are as long as each other, and the noisy ones deflated."""
    monkeypatch.setenv("QATLAB_CACHE", str(tmp_path / "cache"))
    for tree, seed, level in (("clean", 0, 0), ("noisy", 1, 0), ("noisy_z", 1, 9)):
        draw = np.random.default_rng(seed)
        for name in NAMES:
            (tmp_path / tree / "images/val" / name).mkdir(parents=True)
            for i in range(2):
                pixels = Image.fromarray(draw.integers(0, 256, (70, 64, 3), np.uint8) // 2)
                pixels.save(tmp_path / tree / "images/val" / name / f"{i}.png", compress_level=level)
    sizes = {file.stat().st_size for tree in ("clean", "noisy") for file in (tmp_path / tree).rglob("*.png")}
    assert len(sizes) == 1
    given = {tree: SetConfig(f"{tree}/images/val", "shifted") for tree in ("noisy", "noisy_z")}
    every = sets(clip, tmp_path, clean=SetConfig("clean/images/val", "id"), **given)
    found = {}
    for entry in every:  # one start after the other, with one cache
        by_hand(embedder := Embedder([encoder("one", Tower(), [entry])], tmp_path / "store", keep=keep))
        found[entry.source.name] = embedder.features("one", entry)
    assert not torch.allclose(found["clean"], found["noisy"])
    assert torch.allclose(found["noisy"], found["noisy_z"], rtol=0, atol=1e-6)
    for entry in every:  # and what is kept of each tree lies beside what is kept of the others
        again = Embedder([encoder("other", Tower(), [entry])], tmp_path / "store", keep=keep)
        assert by_hand(again).decoded == (0 if keep else 6)
        assert torch.equal(again.features("other", entry), found[entry.source.name])


def test_data_w1_a_kept_image_is_told_by_its_content_not_by_its_checksum(tmp_path: Path, cold: Path) -> None:
    """Two ids that agree in their last 32 bits, as two images among many may."""
    kept = DecodedImages(Preprocess(2, (0.5,) * 3, (0.5,) * 3))
    pixels, found = bytearray(range(12)), bytearray(12)
    kept.write("tree", 0, memoryview(pixels), 5)
    assert kept.read("tree", 0, memoryview(found), 5)
    assert found == pixels
    assert not kept.lacks("tree", 0, 5)
    other = 5 + 2**40
    assert not kept.read("tree", 0, memoryview(found), other)
    assert kept.lacks("tree", 0, other)


def test_data_w1_equal_images_of_a_set_are_decoded_and_seen_once(
    clip: Clip, root: Path, encoder: Any, decoded: Counter[Any], drive: Drive, tmp_path: Path
) -> None:
    shutil.copy(root / "shapes" / NAMES[0] / "0.png", root / "shapes" / NAMES[2] / "again.png")
    whole = sets(clip, root, whole=SetConfig("shapes", "id"))
    n = len(EVERY)
    embedder = Embedder([encoder("one", Tower(), whole)], tmp_path / "store")
    assert drive(embedder) == Work(n, {"one": n})
    features = embedder.features("one", whole[0])
    assert len(features) == n + 1
    assert torch.equal(features[0], features[-1])


def test_images_that_would_fill_the_disk_are_not_kept(
    encoder: Any, decoded: Counter[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QATLAB_CACHE", str(tmp_path / "cache"))
    first = Embedder([encoder("one", Tower(0))], tmp_path / "store", keep=True)
    (kept, own) = first.to_make_for_others("one")
    assert (kept[:8], own) == ("decoded-", "one")
    assert first.to_make_for_others("other") == [kept]
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**18))
    with pytest.raises(
        UserError, match=r"suite.cache=true keeps 30 decoded images, .* GiB are free.*suite.cache=false"
    ):
        by_trainer(first)
    assert not decoded
    monkeypatch.undo()
    monkeypatch.setenv("QATLAB_CACHE", str(tmp_path / "cache"))
    by_trainer(first)
    later = Embedder([encoder("other", Tower(1))], tmp_path / "store", keep=True)
    assert later.to_make_for_others("one") == []  # its own features are nobody else's, and the images are there
    assert later.to_make_for_others("other") == ["other"]
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**18))
    by_trainer(later)


def test_an_image_that_several_encoders_lack_is_decoded_once(
    clip: Clip, root: Path, encoder: Any, decoded: Counter[Any], drive: Drive, tmp_path: Path
) -> None:
    known, new = Tower(0), Tower(1)
    even, odd, *_ = every = sets(clip, root)
    drive(Embedder([encoder("known", known, [even])], tmp_path))
    decoded.clear()
    known.seen.clear()
    embedder = Embedder([encoder("known", known, [even, odd]), encoder("new", new, every)], tmp_path)
    assert drive(embedder) == Work(30, {"known": 12, "new": 30})
    assert set(decoded.values()) == {1}
    assert (sum(known.seen), sum(new.seen)) == (12, 30)
    fresh = Embedder([encoder("known", Tower(0), [even, odd])], tmp_path / "fresh")
    by_hand(fresh)
    for entry in (even, odd):
        torch.testing.assert_close(embedder.features("known", entry), fresh.features("known", entry), rtol=0, atol=1e-6)


def test_an_encoder_that_lacks_nothing_is_not_run(
    clip: Clip, root: Path, encoder: Any, drive: Drive, tmp_path: Path
) -> None:
    known, new, odd = Tower(0), Tower(1), sets(clip, root)[1]
    drive(Embedder([encoder("known", known)], tmp_path))
    known.seen.clear()
    both = Embedder([encoder("known", known), encoder("new", new, [odd])], tmp_path)
    assert drive(both) == Work(12, {"known": 0, "new": 12})
    assert known.seen == []


def test_one_encoder_that_is_asked_for_twice_runs_once(
    clip: Clip, root: Path, encoder: Any, drive: Drive, tmp_path: Path
) -> None:
    """Two runs that are scored side by side share their FP32 model."""
    tower, (even, odd, *_) = Tower(), sets(clip, root)
    embedder = Embedder([encoder("one", tower, [even]), encoder("one", Tower(), [even, odd])], tmp_path)
    assert drive(embedder) == Work(24, {"one": 24})
    assert sum(tower.seen) == 24


# -- features --------------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_tower(clip: Clip, encoder: Any, drive: Drive, tmp_path: Path) -> None:
    embedder = Embedder([encoder("tiny", clip.visual)], tmp_path)
    drive(embedder)
    for entry in embedder.encoders[0].sets:
        images = torch.stack([image for image, _, _ in entry.images.__getitems__(list(range(len(entry.images))))])
        with torch.no_grad():
            expected = normalize(clip.visual(clip.preprocess.normalize(images)), dim=-1)
        found = embedder.features("tiny", entry)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_an_encoder_that_was_left_in_training_mode_is_run_for_evaluation(encoder: Any, tmp_path: Path) -> None:
    tower, dropping = Tower(), Tower()
    dropping.layers.insert(1, nn.Dropout(0.9))
    embedder = Embedder([encoder("one", tower), encoder("dropping", dropping.train())], tmp_path)
    by_trainer(embedder)
    even = embedder.encoders[0].sets[0]
    assert torch.equal(embedder.features("dropping", even), embedder.features("one", even))


def test_each_encoder_has_its_own_preprocessing(clip: Clip, root: Path, encoder: Any, tmp_path: Path) -> None:
    """The pixels of a pool are those before the normalisation, which two models may do otherwise."""
    (entry,) = sets(clip, root, id=SetConfig("embedded:id", "id"))
    tower, dark = Tower(), replace(clip.preprocess, mean=(0.9, 0.9, 0.9))
    two = [encoder("plain", tower, [entry]), replace(encoder("dark", tower, [entry]), preprocess=dark)]
    embedder = Embedder(two, tmp_path)
    assert by_hand(embedder) == Work(20, {"plain": 20, "dark": 20})
    images = pool_of(entry).batch(places_of(entry))
    for key, preprocess in (("plain", clip.preprocess), ("dark", dark)):
        expected = normalize(tower(preprocess.normalize(images)), dim=-1)
        torch.testing.assert_close(embedder.features(key, entry), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["rendered", "copied"])
def test_sets_of_the_same_images_under_other_names_are_embedded(
    clip: Clip, root: Path, encoder: Any, drive: Drive, tmp_path: Path, kind: str
) -> None:
    if kind == "copied":
        shutil.copytree(root / "shapes", root / "again")
    one, other = ("embedded:id", "embedded:id") if kind == "rendered" else ("shapes", "again")
    pair = sets(clip, root, first=SetConfig(one, "id"), second=SetConfig(other, "calibration"))
    n, tower = len(pair[0].images), Tower()
    embedder = Embedder([encoder("one", tower, pair)], tmp_path / "store")
    assert drive(embedder) == Work(n, {"one": n})
    first, second = (embedder.features("one", entry) for entry in pair)
    assert torch.equal(first, second)
    renamed = sets(clip, root, clean=SetConfig(other, "id"))
    assert Embedder([encoder("one", tower, renamed)], tmp_path / "store").images == 0


# -- patches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def forwards(clip: Clip) -> Iterator[list[int]]:
    """How many images each forward of the tiny tower had."""
    seen: list[int] = []
    handle = clip.visual.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    yield seen
    handle.remove()


def flat(clip: Clip, reference: str) -> Local:
    """One class that is as near to every feature."""
    return Local(reference, normalize(torch.ones(1, clip.visual.output_dim), dim=-1), 1.0)


def test_patch_scores_come_from_the_same_forward(
    clip: Clip, root: Path, encoder: Any, forwards: list[int], drive: Drive, tmp_path: Path
) -> None:
    even, odd, *_ = sets(clip, root)
    draws = torch.randn(2, 5, clip.visual.output_dim, generator=torch.Generator().manual_seed(0))
    one, other = (
        Local("even", normalize(of, dim=-1), temperature) for of, temperature in zip(draws, (1.0, 0.1), strict=True)
    )
    asked = encoder("tiny", clip.visual, [even, odd], local={"patches-one": one, "patches-other": other})
    embedder = Embedder([asked], tmp_path)
    assert drive(embedder) == Work(24, {"tiny": 24})
    assert forwards == [BATCH] * 6
    images = pool_of(even).batch(places_of(even))
    with torch.no_grad():
        features, patches = with_patches(clip.visual, clip.preprocess.normalize(images))
    torch.testing.assert_close(embedder.features("tiny", even), normalize(features, dim=-1), rtol=0, atol=1e-6)
    for key, local in (("patches-one", one), ("patches-other", other)):
        found = embedder.features(key, even)
        assert found.shape == (12, 1)
        torch.testing.assert_close(
            found[:, 0].double(), local_mcm(patches, local.classes, local.temperature), rtol=1e-5, atol=1e-7
        )


def test_patch_scores_that_are_asked_for_later_leave_the_features_alone(
    clip: Clip, root: Path, encoder: Any, forwards: list[int], tmp_path: Path
) -> None:
    even = sets(clip, root)[0]
    by_hand(Embedder([encoder("tiny", clip.visual, [even])], tmp_path))
    before, local = files(tmp_path / "tiny"), flat(clip, "even")
    forwards.clear()
    later = Embedder([encoder("tiny", clip.visual, [even], local={"patches": local})], tmp_path)
    assert by_hand(later) == Work(12, {"tiny": 12})
    assert sum(forwards) == 12
    assert files(tmp_path / "tiny") == before
    scored = files(tmp_path / "patches")
    two = {"patches": local, "others": Local("even", -local.classes, 0.5)}
    assert by_hand(Embedder([encoder("tiny", clip.visual, [even], local=two)], tmp_path)) == Work(12, {"tiny": 12})
    assert files(tmp_path / "patches") == scored
    assert Embedder([encoder("tiny", clip.visual, [even], local={"patches": local})], tmp_path).images == 0


def test_patches_are_read_of_the_sets_of_their_reference_alone(
    clip: Clip, root: Path, encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def reading(visual: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        read.append(len(images))
        return with_patches(visual, images)

    monkeypatch.setattr("qatlab.evaluation.embedding.with_patches", reading)
    noise = {"name": "gaussian_noise", "severity": 3}
    clean, noisy = SetConfig("shapes", "id"), SetConfig("shapes", "id", pick=f":{NOISY}", corruption=noise)
    pair = sets(clip, root, clean=clean, noisy=noisy)
    embedder = Embedder([encoder("tiny", clip.visual, pair, local={"patches": flat(clip, "noisy")})], tmp_path)
    assert by_hand(embedder) == Work(30, {"tiny": 30})
    assert sum(read) == NOISY
    assert [len(embedder.features("tiny", entry)) for entry in pair] == [24, NOISY]
    assert embedder.features("patches", pair[1]).shape == (NOISY, 1)


# -- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_shards")
def test_an_interrupted_pass_keeps_whole_shards_and_goes_on_behind_them(
    clip: Clip, root: Path, encoder: Any, decoded: Counter[Any], drive: Drive, tmp_path: Path
) -> None:
    every = sets(clip, root)
    with pytest.raises(RuntimeError, match="struck"):
        by_hand(Embedder([encoder("one", Tower(fails_at=5), every)], tmp_path / "store"))  # as if it was killed
    assert len(files(tmp_path / "store")) == 2
    decoded.clear()
    tower = Tower()
    rest = Embedder([encoder("one", tower, every)], tmp_path / "store")
    assert drive(rest) == Work(14, {"one": 14})
    assert decoded == {**{("", place): 1 for place in EVERY[16:]}, **{("gaussian_noise", i): 1 for i in range(NOISY)}}
    whole = Embedder([encoder("one", tower, every)], tmp_path / "whole")
    by_hand(whole)
    for entry in every:
        assert torch.equal(rest.features("one", entry), whole.features("one", entry))


@pytest.mark.usefixtures("small_shards")
def test_a_feature_file_cut_short_costs_its_own_images(
    clip: Clip, root: Path, encoder: Any, decoded: Counter[Any], drive: Drive, tmp_path: Path
) -> None:
    every, tower = sets(clip, root), Tower()
    first = Embedder([encoder("one", tower, every)], tmp_path)
    by_hand(first)
    before = [first.features("one", entry) for entry in every]
    assert len(files(tmp_path)) == 4
    cut = next(
        file for file in files(tmp_path) if file.stat().st_size == max(f.stat().st_size for f in files(tmp_path))
    )
    cut.write_bytes(cut.read_bytes()[:-9])
    decoded.clear()
    again = Embedder([encoder("one", tower, every)], tmp_path)
    assert drive(again) == Work(8, {"one": 8})
    assert len(decoded) == 8
    assert cut.with_suffix(".damaged").exists()
    for entry, features in zip(every, before, strict=True):
        assert torch.equal(again.features("one", entry), features)


def test_a_damaged_file_that_another_process_puts_aside_first_is_no_matter(
    encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_hand(Embedder([encoder("one", Tower())], tmp_path))
    cut = files(tmp_path)[0]
    cut.write_bytes(cut.read_bytes()[:-9])
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        rename(self, target)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert Embedder([encoder("one", Tower())], tmp_path).images in (NOISY, len(EVERY))


@pytest.mark.usefixtures("small_shards")
def test_a_full_disk_is_named_and_what_was_written_kept(
    encoder: Any, drive: Drive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = Path.write_bytes, []

    def filling(self: Path, data: bytes) -> int:
        if len(written) == 2:
            write(self, data[:100])
            raise OSError(28, "No space left on device")
        written.append(self)
        return write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", filling)
        with pytest.raises(UserError, match=r"\.safetensors could not be written, the disk or quota is full \(\d+ MiB"):
            drive(Embedder([encoder("one", Tower())], tmp_path / "store"))
    assert len([path for path in (tmp_path / "store").rglob("*") if path.is_file()]) == 2
    assert drive(Embedder([encoder("one", Tower())], tmp_path / "store")) == Work(14, {"one": 14})


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named_in_a_sentence(
    clip: Clip, root: Path, encoder: Any, tmp_path: Path, workers: int
) -> None:
    image = root / "shapes" / "star" / "3.png"
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(UserError) as told:
        by_trainer(Embedder([encoder("one", Tower())], tmp_path / "store"), workers)
    assert str(told.value).startswith(f"{image} cannot be read as an image: ")
    assert str(told.value).endswith("Replace it or delete it.")
    assert len(files(tmp_path / "store")) == 2


def test_what_a_pass_held_when_it_ended_is_kept(clip: Clip, root: Path, encoder: Any, tmp_path: Path) -> None:
    image = root / "shapes" / "star" / "3.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:200])
    with pytest.raises(UserError, match="cannot be read as an image"):
        by_trainer(Embedder([encoder("one", Tower())], tmp_path / "store"), 0)
    image.write_bytes(whole)
    left = Embedder([encoder("one", Tower())], tmp_path / "store")
    assert 0 < left.images < 30
    assert left.images % 2 == 0  # whole batches were seen
    assert by_trainer(left, 0).decoded == left.images


class Overflowing(Tower):
    """A tower whose features of the images of one forward are no numbers, as they are where half precision overflows."""

    def forward(self, images: Tensor) -> Tensor:
        features = super().forward(images)
        return features if len(self.seen) != 3 else features / torch.zeros_like(features)


def test_training_f8_features_that_are_no_numbers_reach_no_store(
    clip: Clip, root: Path, encoder: Any, tmp_path: Path
) -> None:
    embedder = Embedder([encoder("one", Overflowing())], tmp_path / "store")
    with pytest.raises(UserError, match=r"features of \d of \d images are NaN or infinite and were not stored"):
        by_trainer(embedder, 0)
    stored = [load_file(file)["features"] for file in files(tmp_path / "store")]
    assert sum(map(len, stored)) == 2 * BATCH  # what was seen before
    assert all(bool(features.isfinite().all()) for features in stored)
    assert by_trainer(Embedder([encoder("one", Tower())], tmp_path / "store"), 0).decoded == 30 - 2 * BATCH


# -- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3, 9])
def test_ranks_fill_the_store_together_with_the_same_bits(
    clip: Clip, root: Path, encoder: Any, decoded: Counter[Any], tmp_path: Path, world: int
) -> None:
    every = sets(clip, root)
    alone = Embedder([encoder("tiny", clip.visual, every)], tmp_path / "alone")
    by_hand(alone)
    decoded.clear()
    ranks = [Embedder([encoder("tiny", clip.visual, every)], tmp_path / "shared") for _ in range(world)]
    counts = [by_hand(embedder, rank, world) for rank, embedder in enumerate(ranks)]
    assert sum(of.decoded for of in counts) == sum(of.encoded["tiny"] for of in counts) == 30
    assert set(decoded.values()) == {1}
    for entry in every:
        assert torch.equal(ranks[0].features("tiny", entry), alone.features("tiny", entry))


def test_loader_processes_change_no_bit(clip: Clip, root: Path, encoder: Any, tmp_path: Path) -> None:
    every = sets(clip, root)
    stored = []
    for workers in (0, 2):
        embedder = Embedder([encoder("tiny", clip.visual, every)], tmp_path / str(workers))
        assert by_trainer(embedder, workers) == Work(30, {"tiny": 30})
        stored.append([embedder.features("tiny", entry) for entry in every])
    assert all(torch.equal(one, other) for one, other in zip(*stored, strict=True))


def test_data_w1_machines_with_other_images_are_told_apart_on_every_rank(
    clip: Clip, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node may have its own copy of a dataset, and one of them may be an old one."""
    shutil.copytree(root, tmp_path / "node")
    processes = Processes(SimpleNamespace(world_size=2), None, None, {})  # type: ignore[arg-type]

    def agree() -> None:
        suites = [SimpleNamespace(sets=sets(clip, place)) for place in (root, tmp_path / "node")]
        told = [{entry.source.name: entry.source.definition for entry in suite.sets} for suite in suites]
        for rank, suite in enumerate(suites):

            def gathered(into: list[Any], mine: Any, rank: int = rank) -> None:
                assert mine == told[rank]
                into[:] = told

            monkeypatch.setattr("torch.distributed.all_gather_object", gathered)
            processes.require_same({entry.source.name: entry.source.definition for entry in suite.sets}, "/data")

    agree()  # a process by itself
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    agree()
    Image.fromarray(np.zeros((70, 64, 3), np.uint8)).save(tmp_path / "node/shapes" / NAMES[0] / "1.png")
    with pytest.raises(
        UserError, match=r"suite\.sets\.odd is not the same for process 1 as for the first: .*root=/data"
    ):
        agree()


def test_ranks_agree_on_what_is_missing(encoder: Any, tmp_path: Path) -> None:
    """Another job may be filling the store while they look: the first one's view counts, or batches would be lost."""
    found: list[Any] = []

    def keep(value: Any) -> Any:
        found.append(value)
        return value

    first = Embedder([encoder("one", Tower())], tmp_path, keep)
    other_job = Embedder([encoder("one", Tower())], tmp_path)
    by_hand(other_job)
    second = Embedder([encoder("one", Tower())], tmp_path, lambda _: found[0])
    assert first.images == second.images == 30
    assert [by_hand(embedder, rank, 2).decoded for rank, embedder in enumerate((first, second))] == [16, 14]
    even = first.encoders[0].sets[0]
    assert torch.equal(first.features("one", even), other_job.features("one", even))
