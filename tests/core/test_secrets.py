"""What is left of addresses and commands where they are printed, stored and hashed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qatlab.config import compose, load, save
from qatlab.core.secrets import holds_secret, shown
from qatlab.results.identity import identity, run_id
from qatlab.results.run import Run

SIGNED = "https://user:hunter2@host/{00000..00009}.tar?sig=SIGNATURE&se=2026-01-01&X-Amz-Credential=CREDENTIAL"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/a?sig=1.tar", "/data/a?sig=1.tar"),  # a file
        ("https://host/{0..3}.tar", "https://host/{0..3}.tar"),
        (SIGNED, "https://...@host/{00000..00009}.tar?sig=...&se=...&X-Amz-Credential=..."),
        ("s3://key:p@ss@bucket/0.tar", "s3://...@bucket/0.tar"),
        ("https://a/0.tar?sig=x::https://b/1.tar?sig=y", "https://a/0.tar?sig=...::https://b/1.tar?sig=..."),
        ("http://u:p@[::1]:80/0.tar?token=x", "http://...@[::1]:80/0.tar?token=..."),
        ("https://host/get?file=00001.tar&token=abc", "https://host/get?file=00001.tar&token=..."),
        ("https://host/get?part={0..9}&password=123", "https://host/get?part={0..9}&password=..."),
        ("https://host/0.tar?SECRET", "https://host/0.tar?..."),
        ("'https://h/0.tar?sig=x' does not answer", "'https://h/0.tar?sig=...' does not answer"),
        ("pipe:cat a.tar | sort -u b", "pipe:cat a.tar | sort -u b"),
        (
            "pipe:curl -H 'Authorization: Bearer abc' -u me:pw https://h/{0..3}.tar",
            "pipe:curl -H 'Authorization:...' -u ... https://h/{0..3}.tar",
        ),
        ("pipe:curl -H X-Api-Key:abc https://h/0.tar", "pipe:curl -H X-Api-Key:... https://h/0.tar"),
        ('pipe:curl -H "Authorization: Bearer $TOKEN" h/0.tar', 'pipe:curl -H "Authorization: Bearer $TOKEN" h/0.tar'),
        ("pipe:AWS_SECRET_ACCESS_KEY=abc aws s3 cp s3://b/0.tar -", "pipe:AWS_SECRET_ACCESS_KEY=... aws s3 cp s3://b/0.tar -"),
        ("pipe:wget --http-password abc -O - h/0.tar", "pipe:wget --http-password ... -O - h/0.tar"),
        ("pipe:azcopy --sas-token='a b' h/0.tar", "pipe:azcopy --sas-token=... h/0.tar"),
        ("pipe:curl 'https://h/0.tar?sig=abc'", "pipe:curl 'https://h/0.tar?sig=...'"),
    ],
)  # fmt: skip
def test_faults_s4_what_opens_a_door_is_not_shown(text: str, expected: str) -> None:
    assert shown(text) == expected
    assert shown(shown(text)) == shown(text)


def test_faults_s4_what_names_a_file_stays_told_apart() -> None:
    """An id that is neither a name nor a signature: two files must not become one."""
    one, other = (shown(f"https://drive.host/uc?id={name}&export=download") for name in ("1AbC", "1AbD"))
    assert one != other
    assert "1AbC" not in one


def test_faults_s4_nothing_that_a_run_stores_holds_a_secret(tmp_path: Path) -> None:
    config = compose("recipe=ptq", "data=cc3m", f"data.shards='{SIGNED}'")
    save(config, "ptq", run_id(config), tmp_path / "config.yaml")
    run = Run(config, "ptq", tmp_path)
    run.append([dict.fromkeys(("stage", "step", "dataset", "definition", "score", "prompts"), "x")])
    stored = (tmp_path / "config.yaml").read_text() + run.results.read_text() + json.dumps(identity(config))
    for secret in ("hunter2", "SIGNATURE", "CREDENTIAL", "2026-01-01"):
        assert secret not in stored
    assert load(tmp_path / "config.yaml")[0].data["shards"] == shown(SIGNED)
    assert config.data["shards"] == SIGNED  # what is read is what was given


def test_faults_s4_a_signature_that_changes_is_the_same_run() -> None:
    def of(url: str) -> str:
        return run_id(compose("recipe=ptq", "data=cc3m", f"data.shards='{url}'"))

    assert of("https://host/0.tar?sig=one&se=2026-01-01") == of("https://host/0.tar?sig=two&se=2027-01-01")
    assert of("https://host/0.tar?sig=one") != of("https://host/1.tar?sig=one")


def test_faults_s4_keys_of_loggers_are_not_stored(tmp_path: Path) -> None:
    block = (
        "{_target_: my.Logger, api_key: KEY, uri: 'https://u:hunter2@h', nested: [{password: WORD, user: me}], n: 3}"
    )
    config = compose("recipe=ptq", f"logger=[csv,{block}]")
    save(config, "ptq", run_id(config), tmp_path / "config.yaml")
    run = Run(config, "ptq", tmp_path)
    run.append([dict.fromkeys(("stage", "step", "dataset", "definition", "score", "prompts"), "x")])
    stored = (tmp_path / "config.yaml").read_text() + (tmp_path / "contexts.jsonl").read_text()
    assert not any(secret in stored for secret in ("KEY", "hunter2", "WORD"))
    kept = {"_target_": "my.Logger", "api_key": "...", "uri": "https://...@h", "n": 3}
    assert load(tmp_path / "config.yaml")[0].logger == ["csv", {**kept, "nested": [{"password": "...", "user": "me"}]}]
    assert config.logger[1]["api_key"] == "KEY"  # what is built is what was given


@pytest.mark.parametrize(
    ("argument", "held"),
    [
        ("logger={_target_: my.Logger, api_key: abc}", True),
        ("logger.api_key=abc", True),
        ("+callbacks.x.auth_token=abc", True),
        ("data.shards=https://h/0.tar?sig=x", True),
        ("quant/act=per_token", False),
        ("data.caption_key=text", False),
        ("logger={_target_: my.Logger, path: a.txt}", False),
    ],
)
def test_faults_s4_an_argument_with_a_secret_is_known(argument: str, held: bool) -> None:
    assert holds_secret(argument) is held
