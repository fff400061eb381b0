"""Where the samples of a tar lie: against webdataset's own reader, on damaged files, and from the cache."""

import gzip
import io
import json
import lzma
import multiprocessing
import os
import pickle
import random
import tarfile
import tracemalloc
from collections import Counter

import pytest
from webdataset.tariterators import tarfile_samples

from qatlab.core.errors import UserError
from qatlab.core.limits import use_limits
from qatlab.data.preprocess import BadImage
from qatlab.data.storage import tars
from qatlab.data.storage.tars import OpenFile, Shards, load_index


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QATLAB_CACHE", str(tmp_path / "cache"))


def write(path, members, kind=tarfile.GNU_FORMAT, mode="w"):
    with tarfile.open(path, mode, format=kind) as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            if data is None:
                entry.type = tarfile.DIRTYPE
            entry.size = len(data or b"")
            tar.addfile(entry, io.BytesIO(data or b""))
    return path


def content(shards, shard=0):
    """Every sample of a shard as webdataset has it."""
    samples = [shards.sample(shard, number) for number in range(shards.count(shard))]
    return [{"__key__": sample.key, **{part: sample.read(part) for part in sample.parts}} for sample in samples]


def streamed(path):
    """What webdataset reads from start to end."""
    return [
        {part: value for part, value in sample.items() if part not in ("__url__", "__local_path__")}
        for sample in tarfile_samples([{"url": str(path)}])
    ]


ODD = [
    ("folder", None),
    ("folder/a.jpg", b"1" * 700),
    ("folder/a.seg.png", b"2"),
    ("folder/a.TXT", b""),
    ("other/a.jpg", b"3" * 512),
    ("__meta__", b"meta"),
    ("__about__/x.jpg", b"meta"),
    ("no_suffix", b"4"),
    ("dotted.folder/b.jpg", b"5"),
    ("c" * 150 + "/" + "d" * 120 + ".jpg", b"6"),
    ("äöü.jpg", b"7"),
    ("folder/a.jpg", b"again, as a sample of its own"),
]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_of_webdataset(tmp_path, kind):
    path = write(tmp_path / "0.tar", ODD, kind)
    expected = streamed(path)
    assert len(expected) == 6
    assert content(Shards([str(path)])) == expected
    assert load_index(str(path)).damage == ""


def parts(shards):
    return [(sample["__key__"], sorted(set(sample) - {"__key__"})) for sample in content(shards)]


def test_data_d1_a_sample_begins_where_a_suffix_comes_again(tmp_path):
    """Six samples by open_clip's rule, where webdataset's reader raises and the whole shard was lost."""
    twice = [(f"{key}.{part}", key.encode()) for key in "abbcde" for part in ("jpg", "txt")]
    path = write(tmp_path / "0.tar", twice)
    with pytest.raises(ValueError, match="duplicate"):
        streamed(path)
    assert parts(Shards([str(path)])) == [(key, ["jpg", "txt"]) for key in "abbcde"]
    assert load_index(str(path)).damage == ""


def test_data_d1_also_where_the_suffix_differs_in_case_or_only_the_image_comes_again(tmp_path):
    path = write(tmp_path / "0.tar", [(name, b"1") for name in ("a.jpg", "b.jpg", "b.JPG", "b.txt", "c.jpg")])
    assert parts(Shards([str(path)])) == [("a", ["jpg"]), ("b", ["jpg"]), ("b", ["jpg", "txt"]), ("c", ["jpg"])]


def test_data_part4_a_second_archive_behind_the_first_is_damage(tmp_path):
    first = write(tmp_path / "0.tar", [("a.jpg", b"1"), ("b.jpg", b"2")]).read_bytes()
    second = write(tmp_path / "1.tar", [("c.jpg", b"3")]).read_bytes()
    (tmp_path / "joined.tar").write_bytes(first + second)
    index = load_index(str(tmp_path / "joined.tar"))
    assert index.keys == ["a", "b"]
    assert index.damage == f"a second archive follows its end at byte {len(first)}, not read"
    (tmp_path / "padded.tar").write_bytes(first + bytes(30_000))
    assert load_index(str(tmp_path / "padded.tar")).damage == ""
    (tmp_path / "signed.tar").write_bytes(first + b"a signature, no archive" * 50)  # nothing is lost
    assert load_index(str(tmp_path / "signed.tar")).damage == ""
    # a lone block of zeros ends an archive for tarfile: what follows it is not read, and that is said
    (tmp_path / "holed.tar").write_bytes(first[:1024] + bytes(512) + first[1024:])
    holed = load_index(str(tmp_path / "holed.tar"))
    assert (holed.keys, holed.damage) == (["a"], "a second archive follows its end at byte 1536, not read")


def test_faults_s7_a_member_above_the_limit_is_not_read(tmp_path, monkeypatch):
    path = write(tmp_path / "0.tar", [("a.jpg", b"1" * 1000), ("a.txt", b"small")])
    (sample,) = [Shards([str(path)]).sample(0, 0)]
    monkeypatch.setenv("QATLAB_LIMITS", "{}")
    use_limits(pixels=10**6, member_bytes=999, names=10)
    read = []
    monkeypatch.setattr(os, "pread", lambda number, size, offset: read.append(size) or b"small")
    with pytest.raises(BadImage, match=r"1000 bytes are above limits\.member_bytes=999"):
        sample.read("jpg")
    assert sample.read("txt") == b"small"
    assert read == [5]


def test_faults_s7_a_long_name_of_a_gigabyte_is_damage_and_not_taken_into_memory(tmp_path):
    """tarfile reads an extended header whole, whatever size it claims; the file here is sparse."""
    path = write(tmp_path / "0.tar", [("a.jpg", b"1"), ("b.jpg", b"2")])
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2**30
    with path.open("r+b") as file:
        file.seek(2048)
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**30 + 10_240)
    tracemalloc.start()
    index = load_index(str(path))
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()
    assert (index.keys, index.damage) == (["a"], "a header of 1073741824 bytes")


@pytest.mark.parametrize("seed", range(6))
def test_cut_anywhere_the_whole_samples_remain(tmp_path, seed):
    draw = random.Random(seed)
    members = [(f"{row}.{part}", draw.randbytes(draw.randrange(1500))) for row in range(6) for part in ("jpg", "txt")]
    whole = write(tmp_path / "whole.tar", members).read_bytes()
    complete = content(Shards([str(tmp_path / "whole.tar")]))
    with tarfile.open(tmp_path / "whole.tar") as tar:
        ends = [member.offset_data + member.size for member in tar][1::2]
        last = tar.offset
    for cut in {0, 100, 512, *draw.choices(range(last), k=60), *ends}:
        path = tmp_path / f"{cut}.tar"
        path.write_bytes(whole[:cut])
        index = load_index(str(path))
        assert index.damage
        if index.keys:
            assert content(Shards([str(path)])) == complete[: len(index)]
        # The last sample that lies within the file may be given up, because more of it may have followed.
        assert len(index) in (sum(end <= cut for end in ends), sum(end <= cut for end in ends) - 1)


@pytest.mark.parametrize("seed", range(4))
def test_no_damage_escapes(tmp_path, seed):
    """Whatever bytes are changed: an index, or that it is no tar, and every sample can be read."""
    draw = random.Random(seed)
    members = [(f"{'long' * 40}{row}.{part}", b"x" * 300) for row in range(4) for part in ("jpg", "txt")]
    whole = write(tmp_path / "whole.tar", members, tarfile.PAX_FORMAT if seed % 2 else tarfile.GNU_FORMAT).read_bytes()
    for number in range(150):
        broken = bytearray(whole)
        header = 512 * draw.randrange(len(whole) // 512)
        for _ in range(draw.choice([1, 12, 200])):
            broken[header + draw.randrange(512)] = draw.choice([0, 48, 55, 57, 128, 255, draw.randrange(256)])
        if draw.random() < 0.7:  # a checksum that fits, so that the damaged fields are believed
            block = bytes(broken[header : header + 148]) + b" " * 8 + bytes(broken[header + 156 : header + 512])
            broken[header + 148 : header + 156] = b"%06o\0 " % sum(block)
        path = tmp_path / f"{number}.tar"
        path.write_bytes(broken)
        shards = Shards([str(path), str(tmp_path / "whole.tar")])
        assert shards.count(1) == 4
        for sample in content(shards):
            assert all(isinstance(value, (str, bytes)) for value in sample.values())


@pytest.mark.parametrize(("size", "reason"), [(-512, "it ends inside b.jpg"), (2**70, "it ends inside b.jpg")])
def test_a_size_that_cannot_be(tmp_path, size, reason):
    """By a size below zero tarfile would come back to the same header for ever."""
    path = write(tmp_path / "0.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("c.jpg", b"3")])
    broken = bytearray(path.read_bytes())
    header = broken[1024:1536]
    header[124:136] = (size & (2**96 - 1) if size < 0 else size | 1 << 95).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    broken[1024:1536] = header
    path.write_bytes(broken)
    index = load_index(str(path))
    assert (index.keys, index.damage) == (["a"], reason)


def test_nothing_readable_is_said_with_the_reason(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"no tar at all" * 100)
    write(tmp_path / "1.tar", [])
    shards = Shards([str(tmp_path / "0.tar"), str(tmp_path / "1.tar")])
    assert shards.count(1) == 0
    assert shards.damage == {}
    with pytest.raises(UserError, match=r"no shard can be read, the last was .*0\.tar: .*header"):
        shards.count(0)


@pytest.mark.usefixtures("settled")
def test_an_index_is_made_once_until_the_file_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "0.tar", [("a.jpg", b"1"), ("b.jpg", b"2")])
    scanned = []
    original = tars._scan
    monkeypatch.setattr(tars, "_scan", lambda *args: scanned.append(args) or original(*args))
    assert load_index(str(path)).keys == load_index(str(path)).keys == ["a", "b"]
    assert len(scanned) == 1
    write(path, [("c.jpg", b"1"), ("d.jpg", b"2")])
    os.utime(path, ns=(1, 1))
    assert load_index(str(path)).keys == ["c", "d"]
    write(path, [("c.jpg", b"1"), ("d.jpg", b"2"), *((f"{row}.jpg", b"3" * 4000) for row in range(5))])
    os.utime(path, ns=(1, 1))
    assert len(load_index(str(path))) == 7
    assert len(scanned) == 3
    for stored in (tmp_path / "cache/index").glob("*.npz"):
        stored.write_bytes(stored.read_bytes()[:50])
    assert len(load_index(str(path))) == 7
    assert len(scanned) == 4
    assert len(load_index(str(path))) == 7
    assert len(scanned) == 4


def rewritten(path, members):
    """Other members of the same names and sizes, with the time of change put back."""
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # until the file system's clock has moved on
        write(path, members)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.usefixtures("settled")
def test_data_w1_a_tar_rewritten_with_the_time_put_back_is_indexed_anew(tmp_path):
    path = write(tmp_path / "0.tar", [("a.jpg", b"1" * 600), ("b.jpg", b"2" * 600)])
    first = load_index(str(path))
    rewritten(path, [("c.jpg", b"3" * 600), ("d.jpg", b"4" * 600)])
    second = load_index(str(path))
    assert (first.keys, second.keys) == (["a", "b"], ["c", "d"])
    assert first.identity != second.identity


def test_data_w1_the_index_of_a_tar_that_was_written_just_now_is_not_kept(tmp_path, monkeypatch):
    path = write(tmp_path / "0.tar", [("a.jpg", b"1")])
    scanned, original, now = [], tars._scan, tars.time.time_ns
    monkeypatch.setattr(tars, "_scan", lambda *args, **more: scanned.append(args) or original(*args, **more))
    assert [load_index(str(path)).settled for _ in range(2)] == [False, False]
    monkeypatch.setattr(tars.time, "time_ns", lambda: now() + 3 * 10**9)
    assert [load_index(str(path)).settled for _ in range(2)] == [True, True]
    assert len(scanned) == 3


@pytest.mark.usefixtures("settled")
def test_data_w1_a_compressed_shard_is_unpacked_again_when_its_content_changes(tmp_path):
    path = tmp_path / "0.tar.gz"
    packed = [gzip.compress(write(tmp_path / "0.tar", [("a.jpg", value * 600)]).read_bytes()) for value in (b"1", b"2")]
    assert len({*map(len, packed)}) == 1
    for data, value in zip(packed, (b"1", b"2"), strict=True):
        path.write_bytes(data)
        os.utime(path, ns=(1, 1))
        assert Shards([str(path)]).sample(0, 0).read("jpg") == value * 600
    os.utime(path, ns=(2, 2))
    load_index(str(path))
    assert len(list((tmp_path / "cache/shards").glob("*.tar"))) == 2  # another time alone is no other content


def test_data_w1_another_name_for_a_tar_that_is_being_read_is_no_change(tmp_path):
    path = write(tmp_path / "0.tar", [("a.jpg", b"1")])
    shards = Shards([str(path)])
    shards.count(0)
    (tmp_path / "backup.tar").hardlink_to(path)
    assert shards.sample(0, 0).read("jpg") == b"1"


def test_a_file_that_changes_under_the_reader_is_named(tmp_path):
    path = write(tmp_path / "0.tar", [("a.jpg", b"1" * 4000), ("b.jpg", b"2" * 4000)])
    opened, closed = Shards([str(path)]), Shards([str(path)])
    assert opened.sample(0, 0).read("jpg") == b"1" * 4000
    assert closed.count(0) == 2
    os.truncate(path, 3000)
    with pytest.raises(UserError, match=r"0\.tar was cut off while it was being read"):
        opened.sample(0, 1).read("jpg")
    with pytest.raises(UserError, match=r"0\.tar was changed while it was being read"):
        closed.sample(0, 1)


def test_a_disk_that_does_not_answer_is_no_damage(tmp_path, monkeypatch):
    """An error of the disk may be gone tomorrow: to pass over the shard would change the sequence of samples."""
    path = write(tmp_path / "0.tar", [("a.jpg", b"1")])

    def failing(*args, **options):
        raise OSError(5, "Input/output error")

    shards = Shards([str(path)])
    shards.count(0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", failing)
        with pytest.raises(UserError, match=r"0\.tar cannot be read: Input/output error"):
            shards.sample(0, 0).read("jpg")
    os.utime(path, ns=(1, 1))
    monkeypatch.setattr(tarfile, "open", failing)
    with pytest.raises(UserError, match=r"0\.tar cannot be read: Input/output error"):
        Shards([str(path)]).count(0)


@pytest.mark.parametrize(("suffix", "pack"), [(".tar.gz", gzip.compress), (".tar.xz", lzma.compress)])
def test_compressed_shards_are_unpacked_into_the_cache(tmp_path, suffix, pack):
    plain = write(tmp_path / "plain.tar", [(f"{row}.jpg", os.urandom(5000)) for row in range(20)])
    packed = tmp_path / f"packed{suffix}"
    packed.write_bytes(pack(plain.read_bytes()))
    assert content(Shards([str(packed)])) == content(Shards([str(plain)]))
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(packed.read_bytes()[:60_000])
    shards = Shards([str(cut)])
    assert content(shards) == content(Shards([str(plain)]))[: shards.count(0)]
    assert 5 < shards.count(0) < 12
    assert shards.damage


def test_open_files_and_indices_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "INDEXED_SAMPLES", 10)
    opened = Counter()
    monkeypatch.setattr(tars, "OpenFile", lambda index: opened.update([index.path]) or OpenFile(index))
    paths = [str(write(tmp_path / f"{shard:03d}.tar", [(f"{shard}.jpg", b"%d" % shard)])) for shard in range(60)]
    shards = Shards(paths)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [shards.sample(shard, 0).read("jpg") for shard in range(60)] == [b"%d" % shard for shard in range(60)]
    assert len(os.listdir("/proc/self/fd")) - before == tars.OPEN_FILES
    assert len(shards._indices) == 10
    assert set(opened.values()) == {2}
    del shards
    assert len(os.listdir("/proc/self/fd")) == before


def read_some(shards, numbers, queue):
    queue.put([shards.sample(0, number).read("jpg") for number in numbers])


def test_it_can_be_carried_into_other_processes(tmp_path):
    members = [(f"{row}.jpg", json.dumps(row).encode()) for row in range(50)]
    shards = Shards([str(write(tmp_path / "0.tar", members))])
    shards.sample(0, 3)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=read_some, args=(shards, range(50), queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    expected = [json.dumps(row).encode() for row in range(50)]
    assert [queue.get(timeout=60) for _ in workers] == [expected] * 2
    for worker in workers:
        worker.join()
    copy = pickle.loads(pickle.dumps(shards))
    assert content(copy) == content(shards)
    del copy  # and with it the files that it had opened itself
    assert content(shards)[0] == {"__key__": "0", "jpg": b"0"}
