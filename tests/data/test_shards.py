"""Shard lists from every spelling, and the sentence for each mistake."""

import http.server
import threading

import pytest
from braceexpand import braceexpand
from omegaconf import OmegaConf

from qatlab.core.errors import UserError
from qatlab.core.limits import use_limits
from qatlab.data.captions.locate import count_names, expand_shards


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


def test_data_c1_patterns_joined_as_in_webdataset_and_open_clip(folder):
    expected = [str(folder / f"{number:05d}.tar") for number in (1, 2, 0)]
    assert expand_shards(f"{folder}/{{00001..00002}}.tar::{folder}/00000.tar") == expected
    (folder / "sub").mkdir()
    (folder / "sub/0.TAR").touch()
    assert expand_shards(f"{folder}/00001.tar::{folder}/sub") == [expected[0], str(folder / "sub/0.TAR")]
    assert expand_shards("gs://a/{0..1}.tar::gs://b/0.tar") == ["gs://a/0.tar", "gs://a/1.tar", "gs://b/0.tar"]
    assert expand_shards("s3://[::1]:9000/{0..1}.tar") == [f"s3://[::1]:9000/{number}.tar" for number in (0, 1)]


@pytest.mark.parametrize(
    "joined", ["*.tar", "0000[12].tar", "00000.tar,00001.tar", "00000.tar 00001.tar", "00000.tar;00001.tar"]
)
def test_data_c1_other_ways_to_say_several_are_named(folder, joined):
    remedy = (
        "wildcards are not expanded here" if joined[0] == "*" or "[" in joined else r"join them by '::' or write a list"
    )
    with pytest.raises(UserError, match=remedy):
        expand_shards(f"{folder}/{joined}")


@pytest.mark.parametrize(
    "pattern",
    ["a", "{1..3}", "{007..1}", "{a..g..2}", "{Z..b}", "x{a,b{1..3},{c,d}e}y{0..9..3}", "{}", "{a}",
     r"\{1..3\}{1,2}", "{,a}", "{5..5}",
     "{9..0..4}", "{1..3..0}", "a{b{1..2}c}", "{-3..2}{x,y}"],
)  # fmt: skip
def test_data_c1_names_are_counted_as_they_are_expanded(pattern):
    assert count_names(pattern) == len(list(braceexpand(pattern)))


@pytest.mark.parametrize("pattern", ["{0..99999999999}.tar", "{00000..09999}{00000..09999}.tar", "a{b,c{1..1000001}}"])
def test_faults_s7_a_pattern_of_too_many_names_is_refused_before_one_is_made(folder, monkeypatch, pattern):
    monkeypatch.setattr("qatlab.data.captions.locate.braceexpand", None)
    with pytest.raises(UserError, match=r"stands for \d+ names, above limits\.names=1000000"):
        expand_shards(f"{folder}/{pattern}")


def test_faults_s7_the_limit_of_names_is_an_option(monkeypatch):
    monkeypatch.setenv("QATLAB_LIMITS", "{}")
    use_limits(pixels=1, member_bytes=1, names=3)
    assert len(expand_shards("gs://{0..2}.tar")) == 3
    with pytest.raises(UserError, match=r"above limits\.names=3"):
        expand_shards("gs://{0..3}.tar")


def test_faults_s5_a_command_in_a_list_file_is_refused(folder):
    listed = folder / "list.txt"
    listed.write_text("\ufeff00000.tar\n  pipe:touch /tmp/ran; cat 00001.tar\n")
    with pytest.raises(UserError, match=r"list\.txt, line 2, is a command \(pipe:\)"):
        expand_shards(str(listed))
    with pytest.raises(UserError, match="is a command"):
        expand_shards(["pipe:true", str(listed)])  # though beside it one was given
    listed.write_text("{pipe:true,00000.tar}\n")  # braces make no command of a path
    with pytest.raises(UserError, match="does not exist"):
        expand_shards(str(listed))


def test_data_part4_what_lies_beside_the_shards_of_a_folder(folder):
    (folder / "._00000.tar").touch()
    (folder / "00003.TAR").touch()
    assert [shard[-9:] for shard in expand_shards(str(folder))] == ["00000.tar", "00001.tar", "00002.tar", "00003.TAR"]
    (folder / "packed").mkdir()
    (folder / "packed/0.tar.gz").touch()
    with pytest.raises(UserError, match=r"holds no \.tar file; name compressed ones by a pattern \(0\.tar\.gz\)"):
        expand_shards(str(folder / "packed"))


def test_faults_s4_the_sentence_for_a_url_that_does_not_answer_holds_no_signature():
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/0\.tar\?sig=\.\.\. does not answer") as failure:
        expand_shards("http://127.0.0.1:9/0.tar?sig=abcdefg")
    assert "abcdefg" not in str(failure.value)
