"""Shard lists from every spelling, and the sentence for each mistake."""

import http.server
import threading

import pytest
from omegaconf import OmegaConf

from qatlab.data.shards import expand_shards
from qatlab.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        (tmp_path / f"{number:05d}.tar").touch()
    return tmp_path


def test_spellings_agree(folder):
    expected = [str(folder / f"{number:05d}.tar") for number in range(3)]
    (folder / "list.txt").write_text(f"# train\n00000.tar\n\n{folder}/{{00001..00002}}.tar\n")
    assert expand_shards(f"{folder}/{{00000..00002}}.tar") == expected
    assert expand_shards(str(folder)) == expected
    assert expand_shards(str(folder / "list.txt")) == expected
    assert expand_shards([expected[0], f"{folder}/{{00001..00002}}.tar"]) == expected
    assert expand_shards(OmegaConf.create(expected)) == expected


def test_pipes_and_object_stores_are_not_checked():
    assert expand_shards("pipe:curl -s host/{0..1}.tar") == ["pipe:curl -s host/0.tar", "pipe:curl -s host/1.tar"]
    assert expand_shards("gs://bucket/0.tar") == ["gs://bucket/0.tar"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (None, r"\"data.shards='/data/cc3m/\{00000..00331\}.tar'\""),
        ([], "names no shard"),
        ("", "names no shard"),
        ("DIR/{00001..00005}.tar", r"00003.tar does not exist \(3 of 5"),
        ("DIR/{00001..00005.tar", "unclosed brace"),
        ("DIR/none.txt", "list file .* cannot be read"),
        ("DIR/empty.txt", "is empty"),
        ("DIR/sub", "holds no .tar"),
        ({"00000..00331": None}, "needs both quotes"),
    ],
)
def test_mistakes(folder, spec, message):
    (folder / "empty.txt").write_text("\n# nothing\n")
    (folder / "sub").mkdir()
    with pytest.raises(UserError, match=message):
        expand_shards(spec.replace("DIR", str(folder)) if isinstance(spec, str) else spec)


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        refused = self.command == "HEAD" and "presigned" in self.path
        self.send_response(404 if "missing" in self.path else 403 if refused else 200)
        self.end_headers()

    do_HEAD = do_GET = answer  # noqa: N815

    def log_message(self, *_):
        pass


def test_urls_are_asked_for():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_port}"
    try:
        assert expand_shards(root + "/{0..3}.tar") == [f"{root}/{number}.tar" for number in range(4)]
        assert expand_shards(root + "/presigned.tar") == [f"{root}/presigned.tar"]
        with pytest.raises(UserError, match=r"missing\.tar does not answer \(HTTP 404\)"):
            expand_shards([root + "/0.tar", root + "/missing.tar"])
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(UserError, match="does not answer"):
        expand_shards(root + "/0.tar")
