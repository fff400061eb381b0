"""Remote shards: fetched once per machine when they are reached, whoever asks, and whole or not at all."""

import bz2
import gzip
import http.server
import multiprocessing
import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from qatlab.core.errors import UserError
from qatlab.core.files import once
from qatlab.data.captions.batches import CaptionModule
from qatlab.data.captions.source import CaptionShards
from qatlab.data.embedded.sets import write_caption_shards
from qatlab.data.preprocess import Preprocess
from qatlab.data.storage.fetch import local_file

PREPROCESS = Preprocess(16, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QATLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_caption_shards(folder, 80, per_shard=20)
    return folder


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; counts what is fetched, and breaks off what is called short."""

    def __init__(self, folder):
        self.folder = folder
        self.fetched = Counter()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def root(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        name = self.path.split("?")[0].strip("/")
        data = (self.server.folder / name.removeprefix("short-")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.server.fetched[name] += 1
            self.wfile.write(data[: len(data) // 2] if name.startswith("short-") else data)

    do_HEAD = do_GET = answer  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def server(folder):
    server = Server(folder)
    yield server
    server.shutdown()
    server.server_close()


def batches(shards, workers, steps, start=0):
    data = CaptionShards(shards, "test")
    made = CaptionModule(data, PREPROCESS, None, 8, None, workers, 0, steps, start)
    return [batch["images"] for batch in made.train_dataloader()]


def test_each_shard_is_fetched_once_by_all_workers(server, folder, cache):
    remote = batches(server.root + "/{00000..00003}.tar", workers=3, steps=12)
    assert server.fetched == {f"0000{shard}.tar": 1 for shard in range(4)}
    for here, there in zip(batches(str(folder), 0, 12), remote, strict=True):
        assert here.equal(there)
    batches(server.root + "/{00000..00003}.tar", workers=2, steps=12)
    assert max(server.fetched.values()) == 1
    assert not list((cache / "shards").glob(".*"))


def test_a_shard_is_fetched_when_it_is_reached(server, monkeypatch):
    monkeypatch.setattr("qatlab.data.captions.order.SHUFFLE_WINDOW", 10)
    data = CaptionShards(server.root + "/{00000..00003}.tar", "test")
    data.fingerprint()
    assert server.fetched == {}
    data.batch(0, 8, 0, 1, PREPROCESS, 0)
    assert sum(server.fetched.values()) == 1
    data.batch(2, 8, 0, 1, PREPROCESS, 0)
    assert sum(server.fetched.values()) == 2


def test_pipes_and_packed_remote_shards(tmp_path, server, folder):
    packed = tmp_path / "packed.tar.gz"
    packed.write_bytes(gzip.compress((folder / "00000.tar").read_bytes()))
    whole = (folder / "00000.tar").read_bytes()
    assert local_file(f"pipe:cat {packed}").read_bytes() == whole
    assert local_file(f"pipe:cat {folder}/00000.tar | cat").read_bytes() == whole
    assert local_file(f"{server.root}/00000.tar?token=1").read_bytes() == whole
    assert local_file(str(folder / "00000.tar")) == folder / "00000.tar"


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("pipe:exit 3", r"pipe:exit 3 cannot be fetched \(its command ended with status 3\)"),
        (
            "ROOT/short-00000.tar?secret=abcdefg",
            r"/short-00000\.tar\?secret=\.\.\. cannot .* command ended with status 18\)",
        ),
        ("nowhere://bucket/0.tar", r"nowhere://bucket/0\.tar cannot be fetched"),
    ],
)
def test_what_cannot_be_fetched_is_named_and_leaves_nothing(server, cache, shard, message):
    with pytest.raises(UserError, match=message) as failure:
        local_file(shard.replace("ROOT", server.root))
    assert "abcdefg" not in str(failure.value)
    assert list((cache / "shards").iterdir()) == []


def test_a_worker_that_cannot_fetch_ends_training_in_one_sentence(cache):
    made = CaptionModule(CaptionShards("pipe:exit 3", "test"), PREPROCESS, None, 8, None, 2, 0, 4)
    batch = next(iter(made.train_dataloader()))
    with pytest.raises(UserError, match=r"^data.shards: pipe:exit 3 cannot be fetched \(.*checkpoint\.$"):
        made.on_before_batch_transfer(batch, 0)


def slowly(path, log, number):
    def write(temporary):
        with log.open("a") as file:
            file.write(f"{number}\n")
        time.sleep(0.3)
        temporary.write_text("made")

    once(path, write)
    assert path.read_text() == "made"


def test_of_several_processes_one_writes_and_the_leftovers_of_a_killed_one_go(cache):
    place = cache / "shards" / "file.tar"
    place.parent.mkdir(parents=True)
    (place.parent / ".file.tar.killed").write_text("half")
    log = cache / "log"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=slowly, args=(place, log, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(log.read_text().splitlines()) == 1
    assert [path.name for path in place.parent.iterdir()] == ["file.tar"]


def test_without_locks_everybody_still_gets_the_file(cache, monkeypatch):
    def refused(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("qatlab.core.files.fcntl.flock", refused)
    once(cache / "file", lambda temporary: temporary.write_text("made"))
    assert (cache / "file").read_text() == "made"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (28, r"/shards/0\.tar could not be written, .* \(\d+ MiB free\)"),
        (13, r"/shards cannot be written to \(Permission denied\)"),
    ],
)
def test_a_folder_that_takes_nothing_is_named(cache, number, message):
    def failing(temporary):
        raise OSError(number, os.strerror(number))

    with pytest.raises(UserError, match=message):
        once(cache / "shards" / "0.tar", failing)
    assert list((cache / "shards").iterdir()) == []


def test_data_w1_the_fingerprint_of_shards_is_of_their_content(tmp_path):
    def print_of(*names):
        return CaptionShards([str(tmp_path / name) for name in names], "test").fingerprint()

    data = bytearray(os.urandom(2**20))
    for name in ("a/0.tar", "b/renamed.tar", "c/0.tar"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(data)
        os.utime(tmp_path / name, (1, 1))
    assert print_of("a/0.tar") == print_of("b/renamed.tar")
    for place in (600, 2**20 // 17 + 9, 2**20 - 600):  # a header, a block in between, the end
        data[place] ^= 1
        (tmp_path / "c/0.tar").write_bytes(data)
        os.utime(tmp_path / "c/0.tar", (1, 1))
        assert print_of("c/0.tar") != print_of("a/0.tar")
        data[place] ^= 1


def test_fingerprint_tells_the_shards(tmp_path, server):
    def print_of(*shards):
        return CaptionShards(list(shards), "test").fingerprint()

    for name, size in {"a/0.tar": 10, "a/1.tar": 20, "b/0.tar": 10, "b/1.tar": 21}.items():
        Path(tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    paths = [str(tmp_path / name) for name in ("a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar")]
    assert print_of(paths[0], paths[1]) == print_of(paths[2], paths[1])  # moved to another folder
    known = {print_of(paths[0], paths[1]), print_of(paths[1], paths[0]), print_of(paths[0], paths[3])}
    known |= {print_of(paths[0]), print_of(f"{server.root}/0000{{0..1}}.tar"), print_of(f"{server.root}/00000.tar")}
    assert len(known) == 6
    assert all(len(text) == 16 for text in known)
    assert server.fetched == {}


def test_faults_s4_a_copy_stays_known_when_its_signature_changes(server, folder):
    first = local_file(f"{server.root}/00000.tar?sig=one&file=0.tar")
    assert local_file(f"{server.root}/00000.tar?sig=two&file=0.tar") == first
    assert local_file(f"{server.root}/00000.tar?sig=two&file=1.tar") != first
    assert server.fetched == {"00000.tar": 2}


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress])
def test_faults_s7_an_archive_that_would_fill_the_disk_is_refused(tmp_path, cache, monkeypatch, pack):
    monkeypatch.setattr("qatlab.data.storage.fetch.UNPACKED_BYTES", 2**20)
    bomb, text = tmp_path / "bomb.tar.packed", tmp_path / "text.tar.packed"
    bomb.write_bytes(pack(bytes(10 * 2**20)))
    text.write_bytes(pack(bytes(2**19)))  # as much smaller, and small all the same
    with pytest.raises(UserError, match=r"bomb\.tar\.packed unpacks to more than 100 times its \d+ bytes"):
        local_file(str(bomb))
    assert list((cache / "shards").iterdir()) == []
    assert local_file(str(text)).stat().st_size == 2**19
