"""Pools: sets that share images on disk decode each of them once, whatever their roles, picks and labels."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qatlab.config import ModelConfig, SetConfig, SuiteConfig
from qatlab.data.images.folders import Folders
from qatlab.data.images.imageset import ImageSet
from qatlab.models import clip as clips
from qatlab.models.clip import Clip
from qatlab.suites.pools import Pool, places_of, pool_of, pooled
from qatlab.suites.suite import Suite, build_suite

NAMES = ["circle", "square", "star"]
PER_CLASS = 5
EVERY = list(range(len(NAMES) * PER_CLASS))


@pytest.fixture(scope="module")
def clip() -> Clip:
    return clips.load(ModelConfig())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """``shapes``: three class folders of five images; ``turned.json``: a label map that moves every class on."""
    draw = np.random.default_rng(0)
    for name in NAMES:
        (tmp_path / "shapes" / name).mkdir(parents=True)
        for i in range(PER_CLASS):
            pixels = draw.integers(0, 256, (70, 64, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "shapes" / name / f"{i}.png")
    turned = dict(zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True))
    (tmp_path / "turned.json").write_text(json.dumps(turned))
    return tmp_path


def suite(clip: Clip, root: Path, **sets: SetConfig) -> Suite:
    return build_suite(SuiteConfig(sets=sets, class_names=NAMES, root=str(root), images=20), clip)


def pool(clip: Clip, root: Path, path: str = "shapes", **options: Any) -> Pool:
    return pool_of(suite(clip, root, only=SetConfig(path, "id", **options)).sets[0])


def stored(of: Pool) -> tuple[str, tuple[int, ...]]:
    """What the features of all images of a pool go under."""
    return of.folder, tuple(of.ids(range(len(of.images.layout))))


def shown(loader: Any) -> tuple[Tensor, list[int]]:
    """The images of a loader, and their places or positions."""
    batches = list(loader)
    return torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches]).tolist()


# -- which images are one pool ---------------------------------------------------------------------------------------


def test_sets_that_share_a_tree_are_one_pool_and_every_place_counts_once(clip: Clip, root: Path) -> None:
    built = suite(
        clip,
        root,
        even=SetConfig("shapes", "id", pick="0::2"),
        odd=SetConfig("shapes", "calibration", pick="1::2"),
        outside=SetConfig("shapes", "far_ood", pick="3:9"),
        turned=SetConfig("shapes", "shifted", classes="turned.json", pick=":7"),
    )
    by_name = {entry.source.name: entry for entry in built.sets}
    assert by_name["turned"].labels.tolist() == [1] * 5 + [2] * 2  # really another label map
    found = pooled(built.sets)
    assert list(found.values()) == [EVERY]
    assert {pool_of(entry).key for entry in built.sets} == {pool.key for pool in found}
    assert {name: places_of(entry) for name, entry in by_name.items()} == {
        "even": EVERY[::2],
        "odd": EVERY[1::2],
        "outside": EVERY[3:9],
        "turned": EVERY[:7],
    }


def test_places_that_no_set_has_are_not_decoded(clip: Clip, root: Path) -> None:
    built = suite(
        clip,
        root,
        first=SetConfig("shapes", "id", pick="::3"),
        other=SetConfig("shapes", "calibration", pick="1::2", exclude=["square"]),
    )
    assert list(pooled(built.sets).values()) == [[0, 1, 3, 6, 9, 10, 12, 14]]


def test_the_same_dataset_elsewhere_has_the_same_features(clip: Clip, root: Path) -> None:
    for place in ("here", "there"):
        shutil.copytree(root / "shapes", root / place / "data" / "shapes")
    (root / "link").symlink_to(root / "here" / "data" / "shapes")
    here, there, link = (pool(clip, root, path) for path in ("here/data/shapes", "there/data/shapes", "link"))
    assert stored(here) == stored(there) == stored(link)
    assert here.key == link.key != there.key  # decoded for itself, if both are asked for


def test_another_corruption_is_another_pool(clip: Clip, root: Path) -> None:
    options: list[dict[str, Any]] = [
        {"name": "gaussian_noise", "severity": 1},
        {"name": "gaussian_noise", "severity": 2},
        {"name": "gaussian_noise", "severity": 1, "seed": 1},
        {"name": "gaussian_noise", "severity": 1, "order": "corrupt_then_resize"},
        {"name": "shot_noise", "severity": 1},
    ]
    pools = [pool(clip, root), *(pool(clip, root, corruption=of) for of in options)]
    assert len({found.key for found in pools}) == len({found.folder for found in pools}) == len(pools)
    assert pool(clip, root, corruption=options[0]).key == pools[1].key
    built = suite(
        clip,
        root,
        clean=SetConfig("shapes", "id", pick="0::2"),
        noisy=SetConfig("shapes", "shifted", pick="1::2", corruption=options[0]),
    )
    assert list(pooled(built.sets).values()) == [EVERY[::2], EVERY[1::2]]


@pytest.mark.parametrize(
    "change", [{"size": 32}, {"interpolation": "bilinear"}, {"resize_mode": "squash"}, {"fill_color": 9}]
)
def test_another_preprocessing_is_another_pool(clip: Clip, root: Path, change: dict[str, Any]) -> None:
    other = pool(replace(clip, preprocess=replace(clip.preprocess, **change)), root)
    assert other.key != pool(clip, root).key
    assert other.folder != pool(clip, root).folder


def test_models_that_normalise_otherwise_share_what_is_decoded(clip: Clip, root: Path) -> None:
    other = replace(clip, preprocess=replace(clip.preprocess, mean=(0.0, 0.0, 0.0)))
    assert pool(other, root).key == pool(clip, root).key


@pytest.mark.parametrize(("change", "kept"), [("longer", 14), ("renamed", 15), ("added", 15), ("removed", 14)])
def test_a_changed_image_is_another_and_the_rest_are_what_they_were(
    clip: Clip, root: Path, change: str, kept: int
) -> None:
    before, image = stored(pool(clip, root)), root / "shapes" / "square" / "3.png"
    if change == "longer":
        image.write_bytes(image.read_bytes() + b"more")
    elif change == "added":
        Image.fromarray(np.zeros((70, 64, 3), np.uint8)).save(image.with_name("9.png"))
    else:
        image.rename(image.with_name("3 again.png") if change == "renamed" else root / "3.png")
    folder, ids = stored(pool(clip, root))
    assert folder == before[0]
    assert len({*ids}) == len(ids) == 15 + {"added": 1, "removed": -1}.get(change, 0)
    assert len({*ids} & {*before[1]}) == kept


def test_other_images_in_files_of_the_same_size_are_another_pool(clip: Clip, root: Path) -> None:
    """An uncompressed file is as long whatever it shows: a corrupted copy of a dataset must not get the clean features."""
    draw = np.random.default_rng(1)
    for tree in ("clean", "fog", "snow"):
        for name in NAMES:
            (root / tree / name).mkdir(parents=True)
            Image.fromarray(draw.integers(0, 256, (64, 64, 3), np.uint8)).save(root / tree / name / "0.bmp")
    built = suite(
        clip,
        root,
        clean=SetConfig("clean", "id"),
        fog=SetConfig("fog", "shifted"),
        snow=SetConfig("snow", "shifted"),  # and they are no twins either
    )
    assert len({identity for entry in built.sets for identity in pool_of(entry).ids(range(3))}) == 9


# -- a set's images in it --------------------------------------------------------------------------------------------


def test_a_probes_images_are_found_in_its_order(clip: Clip, root: Path) -> None:
    built = suite(
        clip, root, even=SetConfig("shapes", "id", pick="0::2"), odd=SetConfig("shapes", "shifted", pick="1::2")
    )
    for entry in built.probe(None, 3).sets:
        places = places_of(entry)
        assert len(places) == 3
        assert set(places) <= set(EVERY[entry.source.name == "odd" :: 2])
        items = entry.images.__getitems__([0, 1, 2])
        assert torch.equal(pool_of(entry).batch(places), torch.stack([image for image, _, _ in items]))
    turned = replace(built.sets[0], images=type(built.sets[0].images)(built.sets[0].images.images, [4, 0, 2]))
    assert places_of(turned) == [8, 0, 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_images_of_the_set(clip: Clip, root: Path, workers: int) -> None:
    (pool,) = pooled(suite(clip, root, shapes=SetConfig("shapes", "id")).sets)
    whole = ImageSet(Folders(root / "shapes"), clip.preprocess, dict.fromkeys(NAMES, 0))
    batches = [[0, 3, 5, 6], [14, 1], [8]]
    images, places = shown(pool.loader(batches, workers, None))
    assert images.dtype == torch.uint8
    assert places == [place for batch in batches for place in batch]
    assert torch.equal(images, torch.stack([whole[place][0] for place in places]))


def test_so_it_does_of_corrupted_images(clip: Clip, root: Path) -> None:
    noisy = {"name": "gaussian_noise", "severity": 3}
    (entry,) = suite(clip, root, noisy=SetConfig("shapes", "id", pick="::-2", corruption=noisy)).sets
    places = places_of(entry)
    assert places == EVERY[::-2]
    images, found = shown(pool_of(entry).loader([places[:5], places[5:]], 0, None))
    assert found == places
    assert torch.equal(images, torch.stack([entry.images.images[i][0] for i in range(len(places))]))


# -- rendered sets ---------------------------------------------------------------------------------------------------


def embedded(clip: Clip, images: int, seed: int = 0, **names: str) -> Suite:
    sets = {name: SetConfig(f"embedded:{kind}", "id" if name == "id" else "shifted") for name, kind in names.items()}
    return build_suite(SuiteConfig(sets=sets, images=images, seed=seed), clip)


def test_a_rendered_set_is_one_pool_however_many_images_it_has(clip: Clip) -> None:
    few, many = (embedded(clip, images, id="id").sets[0] for images in (6, 11))
    assert pool_of(few).key == pool_of(many).key
    for order in ([few, many], [many, few]):
        ((pool, places),) = pooled(order).items()
        assert places == list(range(11))
        images, found = shown(pool.loader([places[:4], places[4:]], 2, None))
        assert found == places
        assert torch.equal(images, torch.stack([many.images.images[i][0] for i in range(11)]))


def test_another_kind_or_seed_is_another_pool(clip: Clip) -> None:
    sets = [*embedded(clip, 4, id="id", noise="noise").sets, *embedded(clip, 4, seed=1, id="id").sets]
    assert len({pool_of(entry).key for entry in sets}) == 3
    assert list(pooled(sets).values()) == [[0, 1, 2, 3]] * 3
