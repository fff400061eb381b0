"""The cache of decoded images: the same tensors with and without, whatever happens to it."""

import multiprocessing
import os
import resource

import pytest
import torch

from qatlab.core.errors import UserError
from qatlab.data.captions.source import CaptionShards
from qatlab.data.embedded.sets import write_caption_shards
from qatlab.data.preprocess import Preprocess
from qatlab.data.rendered import RenderedShards
from qatlab.data.storage import decoded

PREPROCESS = Preprocess(32, (0.5,) * 3, (0.5,) * 3)
RECORD = 3 * 32 * 32 + decoded.MARK
pytestmark = pytest.mark.usefixtures("settled")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QATLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / decoded.FOLDER


@pytest.fixture
def folder(tmp_path):
    write_caption_shards(tmp_path / "shards", 40, per_shard=20)
    return tmp_path / "shards"


@pytest.fixture
def decodes(monkeypatch):
    """The number of images that were decoded."""
    done = []
    original = Preprocess.decode
    monkeypatch.setattr(Preprocess, "decode", lambda self, data: done.append(len(data)) or original(self, data))
    return done


def batches(folder, cache, steps=range(5), preprocess=PREPROCESS):
    source = CaptionShards(str(folder), "test", cache=cache)
    return [source.batch(step, 8, 0, 1, preprocess, 0) for step in steps]


def agree(one, other):
    return all(
        torch.equal(a.images, b.images) and (a.captions, a.keys, a.skipped) == (b.captions, b.keys, b.skipped)
        for a, b in zip(one, other, strict=True)
    )


def test_the_same_batches_with_and_without_and_each_image_decoded_once(folder, decodes):
    plain = batches(folder, False)
    assert len(decodes) == 40
    decodes.clear()
    assert agree(batches(folder, True), plain)
    assert len(decodes) == 40
    assert agree(batches(folder, True), plain)
    assert agree(batches(folder, True, range(5, 15)), batches(folder, True, range(5, 15)))
    first = CaptionShards(str(folder), "test", cache=True).first(40, PREPROCESS)
    assert len(decodes) == 40
    assert torch.equal(first.images, CaptionShards(str(folder), "test").first(40, PREPROCESS).images)


def test_an_image_is_stored_when_it_is_first_decoded(folder, decodes):
    batches(folder, True, [3])
    assert len(decodes) == 8
    batches(folder, True, [2, 3])
    assert len(decodes) == 16


@pytest.mark.parametrize("place", [0, RECORD // 2, RECORD - 17, RECORD - 16, RECORD - 9, RECORD - 8, RECORD - 1])
def test_a_damaged_image_is_decoded_anew(folder, cache, decodes, place):
    plain = batches(folder, True)
    (path,) = list(cache.rglob("*.u8"))[:1]
    with path.open("r+b") as file:
        file.seek(7 * RECORD + place)
        byte = file.read(1)[0]
        file.seek(7 * RECORD + place)
        file.write(bytes([byte ^ 16]))
    decodes.clear()
    assert agree(batches(folder, True), plain)
    assert len(decodes) == 1
    assert agree(batches(folder, True), plain)
    assert len(decodes) == 1


def test_a_file_that_was_cut_or_emptied_is_filled_again(folder, cache, decodes):
    plain = batches(folder, True)
    one, other = cache.rglob("*.u8")
    os.truncate(one, 5 * RECORD - 12)
    os.truncate(other, 0)
    os.truncate(other, 20 * RECORD)  # all zeros, as a hole in a file is
    decodes.clear()
    assert agree(batches(folder, True), plain)
    assert len(decodes) == 16 + 20


def test_what_decides_the_pixels_decides_the_file(folder, tmp_path, decodes):
    others = [
        PREPROCESS,
        Preprocess(31, (0.5,) * 3, (0.5,) * 3),
        Preprocess(32, (0.5,) * 3, (0.5,) * 3, interpolation="bilinear"),
        Preprocess(32, (0.5,) * 3, (0.5,) * 3, resize_mode="squash"),
        Preprocess(32, (0.5,) * 3, (0.5,) * 3, resize_mode="longest", fill_color=9),
    ]
    for preprocess in others:
        decodes.clear()
        batches(folder, True, [0], preprocess)
        assert len(decodes) == 8
    decodes.clear()
    batches(folder, True, [0], Preprocess(32, (0.1,) * 3, (0.2,) * 3))  # normalisation comes later
    assert len(decodes) == 0
    for shard in folder.glob("*.tar"):
        os.utime(shard, (1, 1))
    batches(folder, True, [0])
    assert len(decodes) == 8


def test_data_w1_a_shard_rewritten_with_the_time_put_back_is_decoded_anew(folder, decodes):
    path = folder / "00000.tar"
    before, data = path.stat(), path.read_bytes()
    batches(folder, True)
    decodes.clear()
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        path.write_bytes(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    batches(folder, True)
    assert len(decodes) == 20


def test_one_source_serves_two_preprocessings(folder):
    source = CaptionShards(str(folder), "test", cache=True)
    small = Preprocess(16, (0.5,) * 3, (0.5,) * 3)
    for preprocess in (PREPROCESS, small, PREPROCESS):
        expected = CaptionShards(str(folder), "test").first(5, preprocess).images
        assert torch.equal(source.first(5, preprocess).images, expected)


def read_all(folder, order, queue):
    taken = batches(folder, True, order)
    queue.put([(batch.keys, batch.images.numpy()) for batch in taken])


def test_several_processes_write_at_once(folder, decodes):
    plain = batches(folder, False)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    orders = [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]]
    workers = [context.Process(target=read_all, args=(folder, order, queue)) for order in orders]
    for worker in workers:
        worker.start()
    expected = {tuple(batch.keys): batch.images.numpy() for batch in plain}
    for _ in workers:
        assert all((images == expected[tuple(keys)]).all() for keys, images in queue.get(timeout=60))
    for worker in workers:
        worker.join()
    decodes.clear()
    assert agree(batches(folder, True), plain)
    assert decodes == []


def too_big(folder, queue):
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * RECORD, 10 * RECORD))
    try:
        batches(folder, True)
    except UserError as error:
        queue.put(str(error))


def test_a_file_that_may_not_grow_is_no_signal(folder, cache):
    batches(folder, False)  # the indices are there
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=too_big, args=(folder, queue))
    worker.start()
    said = queue.get(timeout=60)
    worker.join()
    assert said.startswith(str(cache))
    assert "File too large" in said
    assert said.endswith("set data.cache=false and suite.cache=false.")


def test_a_full_disk_is_said_and_leaves_no_half_image(folder, monkeypatch, decodes):
    original, written = os.pwrite, []

    def filling(file, data, offset):
        taken = bytes(data)[: max(0, 2 * RECORD + 100 - sum(written))]
        if not taken:
            raise OSError(28, os.strerror(28))
        written.append(len(taken))
        return original(file, taken, offset)

    with monkeypatch.context() as patch:
        patch.setattr(decoded.os, "pwrite", filling)
        with pytest.raises(UserError, match=r"No space left on device; \d+ MiB are free .*, or set data.cache=false"):
            batches(folder, True)
    decodes.clear()
    assert agree(batches(folder, True), batches(folder, False))
    assert len(decodes) == 38 + 40


def test_a_disk_that_takes_little_at_a_time(folder, monkeypatch, decodes):
    original = os.pwrite
    monkeypatch.setattr(decoded.os, "pwrite", lambda file, data, offset: original(file, data[:1000], offset))
    plain = batches(folder, True)
    decodes.clear()
    assert agree(batches(folder, True), plain)
    assert decodes == []


def test_rendered_shards_take_it_too(decodes):
    for cache, expected in ((False, 8), (True, 16), (True, 16)):
        RenderedShards("embedded", 16, 1, cache=cache).batch(0, 8, 0, 1, PREPROCESS, 0)
        assert len(decodes) == expected
