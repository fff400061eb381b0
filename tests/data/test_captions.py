"""Reading image–caption shards: layouts, damaged samples, and batches that follow the order of samples."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from qatlab.core.errors import UserError
from qatlab.core.limits import use_limits
from qatlab.data.captions import order
from qatlab.data.captions import source as captions
from qatlab.data.captions.batches import StreamedBatches
from qatlab.data.captions.order import Order
from qatlab.data.captions.samples import SkipCounter
from qatlab.data.captions.source import CaptionShards
from qatlab.data.preprocess import Preprocess
from qatlab.data.storage import tars

DATA = Path(os.environ.get("QATLAB_TEST_DATA") or Path(__file__).parents[2] / "../shared/data")
PREPROCESS = Preprocess(8, (0.5,) * 3, (0.5,) * 3)


def image(value, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, dtype="uint8")).save(buffer, kind)
    return buffer.getvalue()


def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    """Three shards of ten samples each; the value of sample i's pixels is i, its caption "picture i"."""
    for shard in range(3):
        members = {}
        for row in range(10):
            value = 10 * shard + row
            members[f"{value:04d}.png"] = image(value)
            members[f"{value:04d}.txt"] = f"picture {value}\n".encode()
        write_shard(tmp_path / f"{shard:05d}.tar", members)
    return tmp_path


def test_first_reads_in_shard_order(shards):
    read = CaptionShards(str(shards), "test").first(12, PREPROCESS)
    assert read.images.shape == (12, 3, 8, 8)
    assert read.images.dtype == torch.uint8
    assert read.images[:, 0, 0, 0].tolist() == list(range(12))
    assert read.captions == [f"picture {value}" for value in range(12)]
    assert read.keys[-1] == "0011"
    assert read.skipped == {}


def test_too_few_samples(shards):
    with pytest.raises(UserError, match="holds 30 readable image–caption pairs, 31 are needed"):
        CaptionShards(str(shards), "test").first(31, PREPROCESS)
    with pytest.raises(UserError, match=r"holds 30 readable|1000000000000 decoded images take 178814 GiB"):
        CaptionShards(str(shards), "test").first(10**12, PREPROCESS)


def test_nothing_is_opened_before_prepare():
    data = CaptionShards(None, "test")
    with pytest.raises(UserError, match=r"data.shards is missing"):
        data.prepare()


def test_every_kind_of_damage_is_counted_and_replaced(tmp_path):
    write_shard(
        tmp_path / "0.tar",
        {
            "a.jpg": image(1, "JPEG"), "a.txt": b"first",
            "b.jpg": image(1, "JPEG")[:200], "b.txt": b"damaged image",
            "c.png": image(3),
            "d.webp": image(4, "WEBP"), "d.txt": b"  \n",
            "e.txt": b"no image",
            "f.jpeg": image(5, "JPEG"), "f.json": b'{"caption": "from json"}',
            "g.png": image(6), "g.json": b'{"caption"',
            "h.PNG": image(7), "h.txt": b"last",
        },
    )  # fmt: skip
    read = CaptionShards(str(tmp_path), "test").first(3, PREPROCESS)
    assert read.captions == ["first", "from json", "last"]
    assert read.skipped == {"corrupt image": 1, "no caption": 2, "no image": 1, "unreadable json": 1}
    reasons = "2 no caption, 1 corrupt image, 1 no image, 1 unreadable json"
    assert str(SkipCounter(read.skipped)) == f"samples skipped and replaced: {reasons}"


def test_the_count_names_the_damaged_shards():
    count = SkipCounter({"no caption": 2, "unreadable shard /b.tar": 1})
    count.update({"unreadable shard /b.tar": 1, "corrupt image": 1})
    skipped = "samples skipped and replaced: 2 no caption, 1 corrupt image"
    assert str(count) == f"{skipped}; 1 unreadable shard, read as far as whole: /b.tar"
    five = SkipCounter({f"unreadable shard {name}.tar": 1 for name in "edcba"})
    assert str(five) == "5 unreadable shards, read as far as whole: a.tar, b.tar, c.tar and 2 more"
    assert five.shards == [f"{name}.tar" for name in "abcde"]
    assert str(SkipCounter()) == "no sample skipped"


def test_a_truncated_shard_is_named_and_the_next_one_read(shards):
    whole = (shards / "00000.tar").read_bytes()
    (shards / "00000.tar").write_bytes(whole[: len(whole) // 4])
    (shards / "00001.tar").write_bytes(b"no tar at all" * 100)
    read = CaptionShards(str(shards), "test").first(12, PREPROCESS)
    assert {"picture 0", "picture 20"} <= set(read.captions)
    assert read.skipped == {f"unreadable shard {shards}/0000{shard}.tar": 1 for shard in (0, 1)}
    with pytest.raises(
        UserError, match=r"holds 1\d readable .*2 unreadable shards, read as far as whole: .*00000\.tar, "
    ):
        CaptionShards(str(shards), "test").first(30, PREPROCESS)


def test_caption_key_reads_one_of_several_by_seed_and_key(tmp_path):
    texts = [f"caption {number}" for number in range(5)]
    members = {}
    for row in range(40):
        members |= {
            f"{row}.png": image(row),
            f"{row}.txt": b"plain",
            f"{row}.json": json.dumps({"texts": texts}).encode(),
        }
    write_shard(tmp_path / "0.tar", members)
    data = CaptionShards(str(tmp_path), "test", caption_key="texts")
    chosen = data.first(40, PREPROCESS, seed=1).captions
    assert set(chosen) == set(texts)
    assert chosen == data.first(40, PREPROCESS, seed=1).captions
    assert chosen != data.first(40, PREPROCESS, seed=2).captions
    with pytest.raises(
        UserError, match=r"40 no caption.*\.json fields: texts \(did you mean 'texts'\?\).*caption_key=text"
    ):
        CaptionShards(str(tmp_path), "test", caption_key="text").first(1, PREPROCESS)
    with pytest.raises(UserError, match="1000 samples in a row are unusable"):
        CaptionShards(str(tmp_path), "test", caption_key="text").batch(0, 8, 0, 1, PREPROCESS, 0)


def keys(source, steps, batch_size=8, rank=0, world=1, seed=0):
    return [source.batch(step, batch_size, rank, world, PREPROCESS, seed).keys for step in steps]


def test_batches_follow_the_order_of_samples(shards, monkeypatch):
    monkeypatch.setattr(order, "SHUFFLE_WINDOW", 12)
    data = CaptionShards(str(shards), "test")
    positions = Order(data.tars, 5)
    expected = [positions.locate(position) for position in range(96)]
    expected = [f"{10 * shard + number:04d}" for shard, number in expected]
    assert keys(data, range(12), seed=5) == [expected[start : start + 8] for start in range(0, 96, 8)]
    assert sorted(expected[30:60]) == sorted(expected[:30]) == [f"{value:04d}" for value in range(30)]
    assert keys(data, range(12)) != keys(data, range(12), seed=5)
    batch = data.batch(3, 8, 0, 1, PREPROCESS, 5)
    assert batch.captions == [f"picture {int(key)}" for key in batch.keys]
    assert batch.images[:, 0, 0, 0].tolist() == [int(key) for key in batch.keys]


def test_a_batch_depends_on_nothing_that_was_read_before(shards):
    straight = keys(CaptionShards(str(shards), "test"), range(20))
    data = CaptionShards(str(shards), "test")
    assert keys(data, [17, 3, 12, 4, 17]) == [straight[step] for step in (17, 3, 12, 4, 17)]
    assert keys(CaptionShards(str(shards), "test"), [19]) == straight[19:]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_divide_each_batch(shards, world):
    whole = keys(CaptionShards(str(shards), "test"), range(10))
    parts = [keys(CaptionShards(str(shards), "test"), range(10), 8, rank, world) for rank in range(world)]
    for step, batch in enumerate(whole):
        assert [parts[row % world][step][row // world] for row in range(8)] == batch


@pytest.mark.usefixtures("settled")
def test_a_resumed_run_opens_only_what_its_step_falls_into(shards, monkeypatch):
    monkeypatch.setattr(order, "SHUFFLE_WINDOW", 5)
    straight = keys(CaptionShards(str(shards), "test"), range(20), batch_size=5)
    opened, scanned = [], []
    original = tars.OpenFile
    monkeypatch.setattr(tars, "OpenFile", lambda index: opened.append(index.path) or original(index))
    monkeypatch.setattr(tars, "_scan", lambda *args: scanned.append(args))
    for step in (1, 9, 16):
        opened.clear()
        assert keys(CaptionShards(str(shards), "test"), [step], batch_size=5) == [straight[step]]
        assert len(opened) == 1
    assert scanned == []


def damage(folder, damaged):
    """Cut the images of some samples of the fixture's shards off."""
    for shard in range(3):
        members = {}
        for value in range(10 * shard, 10 * shard + 10):
            content = image(value)
            members[f"{value:04d}.png"] = content[:20] if value in damaged else content
            members[f"{value:04d}.txt"] = f"picture {value}".encode()
        write_shard(folder / f"{shard:05d}.tar", members)


@pytest.mark.parametrize("world", [1, 2])
def test_an_unusable_sample_is_replaced_by_the_same_place_of_a_later_batch(shards, monkeypatch, world):
    monkeypatch.setattr(order, "SHUFFLE_WINDOW", 12)
    clean = [int(key) for batch in keys(CaptionShards(str(shards), "test"), range(30), 6) for key in batch]
    damaged = {0, 3, 4, 11, 12, 13, 14, 27, 28}
    damage(shards, damaged)
    data = CaptionShards(str(shards), "test")
    for step in range(12):
        expected, skipped = [], 0
        for position in range(6 * step, 6 * step + 6):
            while clean[position] in damaged:
                position, skipped = position + 6, skipped + 1
            expected.append(clean[position])
        parts = [data.batch(step, 6, rank, world, PREPROCESS, 0) for rank in range(world)]
        assert [int(parts[row % world].keys[row // world]) for row in range(6)] == expected
        assert sum(part.skipped.get("corrupt image", 0) for part in parts) == skipped


def test_patience_is_for_samples_in_a_row(shards, monkeypatch):
    monkeypatch.setattr(captions, "PATIENCE", 4)
    damage(shards, set(range(1, 30, 2)) | {20, 22})
    data = CaptionShards(str(shards), "test")
    assert data.first(10, PREPROCESS).skipped == {"corrupt image": 9}
    with pytest.raises(UserError, match="4 samples in a row are unusable"):
        data.first(11, PREPROCESS)


def test_damaged_shards_are_counted_once_in_an_epoch_and_their_whole_samples_used(shards):
    whole = (shards / "00001.tar").read_bytes()
    (shards / "00001.tar").write_bytes(whole[: len(whole) // 2])
    (shards / "00002.tar").write_bytes(b"no tar at all" * 100)
    data = CaptionShards(str(shards), "test")
    length = 10 + data.tars.count(1)
    assert 12 <= length <= 18
    found = [[data.batch(step, length, rank, 2, PREPROCESS, 0) for rank in (0, 1)] for step in range(6)]
    expected = {f"{value:04d}" for value in range(length)}
    assert all({*even.keys, *odd.keys} == expected for even, odd in found)
    # Both begin in an epoch; an empty one that is the last of its epoch begins with the next
    counts = SkipCounter.summed(part.skipped for parts in found for part in parts)
    assert counts[f"unreadable shard {shards}/00001.tar"] == 6
    assert counts[f"unreadable shard {shards}/00002.tar"] in (5, 6)
    assert counts.shards == [f"{shards}/00001.tar", f"{shards}/00002.tar"]
    assert all(part.skipped == {} for _, part in found)


def test_no_shard_that_can_be_read(shards):
    for name in ("00000", "00001", "00002"):
        (shards / f"{name}.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"no shard can be read, the last was .*/0000\d\.tar: "):
        CaptionShards(str(shards), "test").batch(0, 8, 0, 1, PREPROCESS, 0)
    with pytest.raises(UserError, match=r"no shard can be read, the last was .*/00002\.tar: "):
        CaptionShards(str(shards), "test").first(8, PREPROCESS)


UNREADABLE, NONE = "unreadable caption", "no caption"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("café".encode("latin-1"), UNREADABLE),
        ("a cat".encode("utf-16"), UNREADABLE),
        ("a cat".encode("utf-16-le"), UNREADABLE),  # valid UTF-8, a NUL for every other letter
        ("\ufeff".encode(), NONE),
        ("\u200b \u2060\t".encode(), NONE),
        (b"\x00\x1b", NONE),
        ("\u2800\u3164".encode(), NONE),
        ("\ufeffa cat \n".encode(), "a cat"),
        ("\ufeff\ufeff".encode(), NONE),
        ("日本 👩‍👩‍👧".encode(), "日本 👩‍👩‍👧"),  # joined by invisible letters
        (b"...", "..."),
    ],
)
def test_data_w9_captions_that_cannot_be_read_or_seen_are_counted(tmp_path, data, expected):
    write_shard(tmp_path / "0.tar", {"a.png": image(1), "a.txt": data, "b.png": image(2), "b.txt": b"last"})
    read = CaptionShards(str(tmp_path), "test").first(1, PREPROCESS)
    skipped = expected in (UNREADABLE, NONE)
    assert read.captions == ["last" if skipped else expected]
    assert read.skipped == ({expected: 1} if skipped else {})


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"caption": "half of \\ud83d"}', UNREADABLE),
        (b'{"caption": "\\ufeff\\u200b"}', NONE),
        (b'{"caption": ["\\u200b", "half \\udc00", "a cat"]}', "a cat"),
        (b'{"caption": ["\\u200b", "half \\udc00"]}', UNREADABLE),
        ('{"caption": "a cat"}'.encode("utf-16"), "a cat"),  # JSON says itself how it is written
        (b"[" * 100_000, "unreadable json"),
        ('{"caption": "café"}'.encode("latin-1"), "unreadable json"),
    ],
)
def test_data_w9_captions_in_json_too(tmp_path, data, expected):
    write_shard(tmp_path / "0.tar", {"a.png": image(1), "a.json": data, "b.png": image(2), "b.txt": b"last"})
    read = CaptionShards(str(tmp_path), "test").first(1, PREPROCESS)
    skipped = expected in (UNREADABLE, NONE, "unreadable json")
    assert read.captions == ["last" if skipped else expected]
    assert read.skipped == ({expected: 1} if skipped else {})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ('[{"text": "a"}]', "caption holds a list of dict"),
        ('" "', "caption holds empty text"),
        ("3", "caption holds int"),
    ],
)
def test_data_part4_a_field_that_is_there_is_not_offered_again(tmp_path, value, said):
    write_shard(tmp_path / "0.tar", {"a.png": image(1), "a.json": f'{{"caption": {value}, "captions": []}}'.encode()})
    with pytest.raises(UserError, match=said) as failure:
        CaptionShards(str(tmp_path), "test").first(1, PREPROCESS)
    assert "did you mean" not in str(failure.value)


def bad_avif():
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (9, 99, 200)).save(buffer, "AVIF")
    data = bytearray(buffer.getvalue())
    data[81] = 0
    return bytes(data)


def test_data_t3_one_bad_image_of_any_format_is_counted_in_a_shard(tmp_path):
    write_shard(
        tmp_path / "0.tar",
        {
            "a.jpg": bad_avif(),
            "a.txt": b"bad",
            "b.jpg": b"DDS " + bytes(200),
            "b.txt": b"bad",
            "c.png": image(3),
            "c.txt": b"c",
        },
    )
    read = CaptionShards(str(tmp_path), "test").first(1, PREPROCESS)
    assert (read.captions, read.skipped) == (["c"], {"corrupt image": 2})


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_faults_s6_limits_reach_the_processes_that_read(tmp_path, monkeypatch, method):
    """Two of three images are above a limit, one by its pixels and one by its bytes; the stream goes on with the third."""
    monkeypatch.setenv("QATLAB_LIMITS", "{}")
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), "uint8")).save(noise, "PNG")
    wide = io.BytesIO()
    Image.new("RGB", (9, 8)).save(wide, "PNG")
    members = {"a.png": wide.getvalue(), "b.png": noise.getvalue(), "c.png": image(3)}
    members |= {f"{key}.txt": key.encode() for key in "abc"}
    write_shard(tmp_path / "0.tar", {name: members[name] for name in sorted(members)})
    use_limits(pixels=64, member_bytes=len(noise.getvalue()) - 1, names=10)
    batches = StreamedBatches(CaptionShards(str(tmp_path), "test"), PREPROCESS, None, 3, 0, (0, 1), range(1))
    (batch,) = DataLoader(batches, batch_size=None, num_workers=1, multiprocessing_context=method)
    assert batch["images"][:, 0, 0, 0].tolist() == [3, 3, 3]
    assert batch["skipped"]["corrupt image"] >= 2
    use_limits(pixels=72, member_bytes=2**20, names=10)
    (batch,) = DataLoader(batches, batch_size=None, num_workers=1, multiprocessing_context=method)
    assert batch["skipped"] == {}


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real shards at {DATA} (QATLAB_TEST_DATA)")
def test_real_shards():
    preprocess = Preprocess(224, (0.5,) * 3, (0.5,) * 3)
    data = CaptionShards(str(DATA / "flickr8k/{00000..00004}.tar"), "flickr8k", caption_key="captions")
    read = data.first(5, preprocess)
    assert read.images.float().std() > 20
    assert all(len(caption) > 10 for caption in read.captions)
    assert len(set(data.batch(50, 20, 0, 1, preprocess, 0).keys)) == 20
