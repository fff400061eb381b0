"""Reading image–caption shards: layouts, damaged samples, and a stream that never runs dry."""

import io
import itertools
import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qatlab.data.captions import CaptionShards, SkipCounter
from qatlab.data.transforms import Preprocess
from qatlab.errors import UserError

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


def test_a_truncated_shard_is_counted_and_the_next_one_read(shards):
    whole = (shards / "00000.tar").read_bytes()
    (shards / "00000.tar").write_bytes(whole[: len(whole) // 4])
    (shards / "00001.tar").write_bytes(b"no tar at all" * 100)
    read = CaptionShards(str(shards), "test").first(12, PREPROCESS)
    assert {"picture 0", "picture 20"} <= set(read.captions)
    assert read.skipped == {"unreadable shard": 2}


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
        next(CaptionShards(str(tmp_path), "test", caption_key="text").stream(PREPROCESS, 0))


def keys(stream, count):
    return [pair.key for pair in itertools.islice(stream, count)]


def test_stream_repeats_with_its_seed_and_shuffles(shards):
    data = CaptionShards(str(shards), "test")
    order = keys(data.stream(PREPROCESS, 0), 60)
    assert order == keys(data.stream(PREPROCESS, 0), 60)
    assert order != keys(data.stream(PREPROCESS, 1), 60)
    assert order != keys(data.stream(PREPROCESS, 0, start_step=5), 60)
    assert order[:30] != sorted(order[:30])


def test_ranks_share_the_shards_evenly(shards):
    data = CaptionShards(str(shards), "test")
    counts = Counter()
    for rank in range(3):
        counts.update(keys(data.stream(PREPROCESS, 0, rank, 3), 300))
    assert len(counts) == 30
    assert max(counts.values()) < 3 * min(counts.values())


def test_more_ranks_than_shards_do_not_run_dry(shards):
    data = CaptionShards(str(shards / "00000.tar"), "test")
    assert all(len(keys(data.stream(PREPROCESS, 0, rank, 8), 25)) == 25 for rank in (0, 7))


def test_stream_counts_what_it_skips_and_stops_when_no_shard_can_be_read(shards):
    (shards / "00001.tar").write_bytes(b"no tar at all" * 100)
    pairs = itertools.islice(CaptionShards(str(shards), "test").stream(PREPROCESS, 0), 700)
    assert SkipCounter.summed(pair.skipped for pair in pairs)["unreadable shard"] > 5
    with pytest.raises(UserError, match="no shard can be read"):
        next(CaptionShards(str(shards / "00001.tar"), "test").stream(PREPROCESS, 0))


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real shards at {DATA} (QATLAB_TEST_DATA)")
def test_real_shards():
    preprocess = Preprocess(224, (0.5,) * 3, (0.5,) * 3)
    data = CaptionShards(str(DATA / "flickr8k/{00000..00004}.tar"), "flickr8k", caption_key="captions")
    read = data.first(5, preprocess)
    assert read.images.float().std() > 20
    assert all(len(caption) > 10 for caption in read.captions)
    assert len({pair.key for pair in itertools.islice(data.stream(preprocess, 0), 20)}) == 20
