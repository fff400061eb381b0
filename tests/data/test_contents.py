"""What images are, by content: in every layout, wherever the tree lies, read once and never trusted too early."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import golden_values
import numpy as np
import pytest
import torch
from PIL import Image

from qatlab.config import ModelConfig, SetConfig, SuiteConfig
from qatlab.core import contents
from qatlab.core.errors import UserError
from qatlab.data.corruptions import Corrupt
from qatlab.data.images.folders import Folders
from qatlab.data.images.imageset import ImageSet
from qatlab.data.images.imglists import ImgList
from qatlab.data.images.layouts import open_layout
from qatlab.data.preprocess import Preprocess
from qatlab.models import clip as clips
from qatlab.models.clip import Clip
from qatlab.suites.pools import pool_of, pooled
from qatlab.suites.suite import Suite, build_suite

P = Preprocess(8, (0.5,) * 3, (0.5,) * 3)
# Where each layout of the tree has its images, and the grey value of the second one.
IMAGES = {
    "folders": ("folders/star/0.ppm", 11),
    "imglist": ("imglist/1.ppm", 21),
    "manifest": ("manifest/1.ppm", 31),
    "tiny_imagenet": ("tiny/images/1.ppm", 41),
    "webdataset": ("web/test/0.tar", 51),
    "cifar": ("cifar/test_batch", 61),
    "npy": ("npy/fog.npy", 71),
}
OF_FILES = [kind for kind, (file, _) in IMAGES.items() if file.endswith(".ppm")]
OPENED: Counter[str] = Counter()
sys.addaudithook(lambda event, told: (event == "open" and OPENED.update([os.path.basename(str(told[0]))])) or None)

pytestmark = pytest.mark.usefixtures("cold")


@pytest.fixture(scope="module")
def clip() -> Clip:
    return clips.load(ModelConfig())


@pytest.fixture
def tree(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    return tmp_path / "tree", golden_values.write_tree(tmp_path / "tree")


def of_layout(root: Path, path: str, **options: Any) -> ImageSet:
    return ImageSet(open_layout(root / path), P, None, **options)


def image(file: Path, seed: int, level: int = 0) -> Path:
    """Noise of 32 x 32 pixels as PNG, stored or deflated."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), "u1")
    Image.fromarray(pixels).save(file, compress_level=level)
    return file


def overwrite(file: Path, value: int) -> None:
    """Write other pixels into the second image of a file, with neither its size nor its time of change showing it."""
    before = file.stat()
    data = file.read_bytes()
    other = data.replace(bytes([value]) * 3072, bytes([value + 5]) * 3072, 1)
    assert data != other
    while file.stat().st_ctime_ns == before.st_ctime_ns:  # until the file system's clock has moved on
        with file.open("r+b") as opened:
            opened.write(other)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)


def opened(what: Callable[[], Any]) -> Counter[str]:
    """How often files of each name are opened meanwhile."""
    OPENED.clear()
    what()
    return Counter(OPENED)


# -- other images are other images -----------------------------------------------------------------------------------


def test_data_w1_other_images_in_files_of_the_same_name_and_size(tmp_path: Path) -> None:
    trees = [tmp_path / name / "images/val" for name in ("clean", "fogged")]
    sizes = {image(root / "cat/0.png", seed).stat().st_size for seed, root in enumerate(trees)}
    assert len(sizes) == 1
    a, b = (ImageSet(Folders(root), P, {"cat": 0}) for root in trees)
    assert not torch.equal(a[0][0], b[0][0])
    assert a.ids([0]) != b.ids([0])
    assert a.fingerprint() != b.fingerprint()


def test_data_w1_sets_of_equal_names_and_sizes_are_no_twins_and_copies_are(clip: Clip, tmp_path: Path) -> None:
    for name, seed in (("clean", 0), ("noisy", 1), ("again", 1)):
        for i, shape in enumerate(golden_values.CLASSES):
            image(tmp_path / name / "images/val" / shape / "0.png", 10 * seed + i)

    def suite(*names: str) -> Suite:
        sets = {name: SetConfig(f"{name}/images/val", "shifted" if name != "clean" else "id") for name in names}
        return build_suite(SuiteConfig(root=str(tmp_path), sets=sets, class_names=golden_values.CLASSES), clip)

    clean, noisy = (entry.source.definition for entry in suite("clean", "noisy").sets)
    assert clean != noisy
    with pytest.raises(UserError, match=r"noisy and suite\.sets\.again are the same images in the same role"):
        suite("clean", "noisy", "again")


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("kind", IMAGES)
def test_data_w1_a_rewrite_of_equal_length_with_the_time_put_back_is_noticed(
    tree: tuple[Path, dict[str, str]], kind: str
) -> None:
    root, paths = tree
    before = of_layout(root, paths[kind])
    first, second = before.ids([0, 1])
    assert of_layout(root, paths[kind]).ids([0, 1]) == [first, second]
    prints = before.fingerprint()
    overwrite(root / IMAGES[kind][0], IMAGES[kind][1])
    after = of_layout(root, paths[kind])
    now = after.ids([0, 1])
    assert now[0] == first
    assert now[1] != second
    assert after.fingerprint() != prints
    assert after.pool == before.pool


@pytest.mark.usefixtures("settled")
def test_data_w1_another_file_moved_over_an_image_is_noticed(tmp_path: Path) -> None:
    """Of the same size and time of change, and old: nothing but its inode and its path say that it is another."""
    here, other = (image(tmp_path / name, seed) for seed, name in enumerate(("set/cat/0.png", "other.png")))
    for file in (here, other):
        os.utime(file, ns=(10**18, 10**18))
    linked = here.with_name("1.png")
    linked.hardlink_to(here)
    first, same = ImageSet(Folders(tmp_path / "set"), P, {"cat": 0}).ids([0, 1])
    assert first == same
    other.replace(here)
    second, kept = ImageSet(Folders(tmp_path / "set"), P, {"cat": 0}).ids([0, 1])
    assert second != first
    assert kept == first  # the old image lives on under its second name


@pytest.mark.parametrize("listed", [False, True])
def test_data_w1_an_image_that_changes_while_the_set_is_read_ends_it(tmp_path: Path, listed: bool) -> None:
    file = image(tmp_path / "cat/0.png", 0)
    (tmp_path / "list.txt").write_text("cat/0.png 0\n")
    layout = ImgList(tmp_path / "list.txt") if listed else Folders(tmp_path)
    items = ImageSet(layout, P, {"cat": 0, 0: 0})
    before = items[0][0]
    items.ids([0])
    os.utime(file)
    assert torch.equal(items[0][0], before)  # looked at again, it is the same
    image(file, 1)
    with pytest.raises(UserError, match=r"cat/0\.png was changed while the set was being read: give the same command"):
        items[0]


def test_data_w1_two_lists_of_one_folder_are_two_pools(clip: Clip, tmp_path: Path) -> None:
    """As OpenOOD's are: the places of one list say nothing of another's."""
    for i in range(5):
        image(tmp_path / "all" / f"{i}.png", i)
    (tmp_path / "id.txt").write_text("0.png 0\n1.png 1\n")
    (tmp_path / "ood.txt").write_text("2.png -1\n3.png -1\n4.png -1\n")
    sets = {name: SetConfig(f"{name}.txt", role, folder="all") for name, role in (("id", "id"), ("ood", "far_ood"))}
    built = build_suite(SuiteConfig(root=str(tmp_path), sets=sets, class_names=golden_values.CLASSES), clip)
    ids = {i: built.sets[i > 1].images.images.ids([i - 2 * (i > 1)])[0] for i in range(5)}
    assert len({*ids.values()}) == 5
    assert [(places, pool.ids(places)) for pool, places in pooled(built.sets).items()] == [
        ([0, 1], [ids[0], ids[1]]),
        ([0, 1, 2], [ids[2], ids[3], ids[4]]),
    ]


def test_data_w1_equal_files_are_one_image_unless_a_corruption_is_drawn_by_their_names(tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):
        image(tmp_path / "cat" / name, 0)
    clean = ImageSet(Folders(tmp_path), P, {"cat": 0})
    assert len({*clean.ids([0, 1])}) == 1
    noise = Corrupt("gaussian_noise", 3)
    noisy = ImageSet(Folders(tmp_path), P, {"cat": 0}, corruption=noise)
    assert not torch.equal(noisy[0][0], noisy[1][0])
    assert len({*clean.ids([0]), *noisy.ids([0, 1])}) == 3
    assert noisy.pool != clean.pool


# -- the same images are the same everywhere -------------------------------------------------------------------------


def test_data_w1_a_copy_elsewhere_has_the_same_ids_pools_and_definitions(
    clip: Clip, tree: tuple[Path, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, paths = tree

    def told(root: Path) -> dict[str, Any]:
        sets = {name: SetConfig(path, "id") for name, path in paths.items()}
        noise = {"name": "gaussian_noise", "severity": 1}
        sets |= {f"noisy {name}": SetConfig(path, "id", corruption=noise) for name, path in paths.items()}
        built = build_suite(SuiteConfig(root=str(root), sets=sets, class_names=golden_values.CLASSES), clip)
        return {e.source.name: (e.source.definition, pool_of(e).folder, pool_of(e).ids([0, 1])) for e in built.sets}

    here = told(root)
    for file in (path for path in root.rglob("*") if path.is_file()):
        os.utime(file, ns=(10**18, 10**18))
    shutil.copytree(root, tmp_path / "far/away")
    monkeypatch.setenv("QATLAB_CACHE", str(tmp_path / "other cache"))
    assert told(tmp_path / "far/away") == here
    definitions, pools, _ = zip(*here.values(), strict=True)
    assert len({*definitions}) == len(here)
    assert len({*pools}) == 2


# -- how often files are read ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("kind", OF_FILES)
def test_data_w1_a_second_start_looks_at_each_image_once_and_reads_none(
    tree: tuple[Path, dict[str, str]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, paths = tree
    names = {path.name for path in (root / IMAGES[kind][0]).parent.iterdir() if path.suffix == ".ppm"}
    first = opened(lambda: of_layout(root, paths[kind]).fingerprint())
    assert {name: first[name] for name in names} == dict.fromkeys(names, 2 if kind == "folders" else 1)
    looked: Counter[str] = Counter()
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda file, *a, **k: looked.update([str(file)]) or stat(file, *a, **k))
    again = opened(lambda: of_layout(root, paths[kind]).fingerprint())
    assert not names & again.keys()
    assert [count for file, count in looked.items() if file.endswith(".ppm")] == [1, 1]


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("kind", ["webdataset", "npy"])
def test_data_w1_a_second_start_reads_no_image_of_a_tar_or_array(
    tree: tuple[Path, dict[str, str]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, paths = tree
    done: list[int] = []
    read_all = contents._read_all
    monkeypatch.setattr(contents, "_read_all", lambda places, read: done.extend(places) or read_all(places, read))
    prints = [of_layout(root, paths[kind]).fingerprint() for _ in range(2)]
    assert prints[0] == prints[1]
    assert done == [0, 1]


def test_data_w1_a_file_that_is_younger_than_two_seconds_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, now = image(tmp_path / "cat/0.png", 0), contents.time.time_ns

    def start(seconds: float) -> int:
        monkeypatch.setattr(contents.time, "time_ns", lambda: now() + int(seconds * 1e9))
        return opened(lambda: ImageSet(Folders(tmp_path), P, {"cat": 0}).ids([0]))["0.png"]

    assert [start(0), start(0), start(1), start(3), start(3), start(0)] == [1, 1, 1, 1, 0, 0]
    os.utime(file, ns=(10**18, 10**18))  # an old time of change, but of an inode that was just touched
    assert [start(0), start(0), start(3), start(3)] == [1, 1, 1, 0]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
@pytest.mark.usefixtures("settled")
def test_data_w1_a_damaged_table_is_made_again(tmp_path: Path, cold: Path, damage: str) -> None:
    image(tmp_path / "set/cat/0.png", 0)

    def ids() -> list[int]:
        return ImageSet(Folders(tmp_path / "set"), P, {"cat": 0}).ids([0])

    first = ids()
    (table,) = (cold / "contents").iterdir()
    data = bytearray(table.read_bytes())
    data[-1] ^= damage == "flipped"
    table.write_bytes({"cut": data[:-9], "flipped": data, "empty": b"", "foreign": b"\x80" * 100}[damage])
    found: list[list[int]] = []
    assert opened(lambda: found.append(ids()))["0.png"] == 1
    assert opened(lambda: found.append(ids()))["0.png"] == 0
    assert found == [first, first]


def test_data_w1_a_cache_that_cannot_be_written_is_told_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate(("one", "two")):
        image(tmp_path / name / "cat/0.png", seed)
    (tmp_path / "file").touch()
    monkeypatch.setenv("QATLAB_CACHE", str(tmp_path / "file/cache"))
    monkeypatch.setattr(contents, "_said", set())
    one, two = (ImageSet(Folders(tmp_path / name), P, {"cat": 0}).ids([0]) for name in ("one", "two"))
    assert one != two
    assert capsys.readouterr().out.count("cannot be kept in the cache and is read from them at every start") == 1


def test_data_w1_a_file_that_cannot_be_read_is_named_in_a_sentence(tmp_path: Path) -> None:
    file = image(tmp_path / "cat/0.png", 0)
    items = ImageSet(Folders(tmp_path), P, {"cat": 0})
    file.unlink()
    with pytest.raises(UserError, match=r"cat/0\.png cannot be read as an image: No such file or directory\. Replace"):
        items.fingerprint()


# -- several processes -----------------------------------------------------------------------------------------------


@dataclass
class Start:
    """What one of several processes does at once: it asks what the images are, and notes each file that it reads."""

    root: Path
    log: Path
    together: Any

    def __call__(self, told: Any) -> None:
        read = contents._read

        def noted(path: str) -> contents.Found:
            with self.log.open("a") as log:
                log.write(f"{path}\n")
            return read(path)

        contents._read = noted
        items = ImageSet(Folders(self.root), P, None)
        self.together.wait()
        told.put(items.fingerprint())


@pytest.mark.usefixtures("settled")
def test_data_w1_of_two_processes_one_reads_and_both_know(tmp_path: Path) -> None:
    for i in range(100):
        image(tmp_path / "set" / f"{i}.png", i)
    context = multiprocessing.get_context("fork")
    told, start = context.Queue(), Start(tmp_path / "set", tmp_path / "log", context.Barrier(2))
    processes = [context.Process(target=start, args=(told,)) for _ in range(2)]
    for process in processes:
        process.start()
    prints = {told.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert prints == {ImageSet(Folders(tmp_path / "set"), P, None).fingerprint()}
    assert len((tmp_path / "log").read_text().splitlines()) == 100


@pytest.mark.usefixtures("settled")
def test_data_w1_threads_hash_what_one_alone_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "BLOCK", 75)
    files = [image(tmp_path / "set" / f"{i:03d}.png", i) for i in range(150)]
    seen: set[str] = set()
    read = contents._read
    monkeypatch.setattr(contents, "_read", lambda path: seen.add(threading.current_thread().name) or read(path))
    found = Folders(tmp_path / "set").contents(range(150))
    assert [row.tobytes().hex() for row in found] == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert threading.main_thread().name not in seen
