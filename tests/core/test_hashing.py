"""Hashes are SHA-256 of the bytes as they come: stored ids and checksums rest on it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from qatlab.core import hashing
from qatlab.core.hashing import digest, file_digest, sha256


def test_the_empty_text_and_abc_have_the_published_hashes() -> None:
    """FIPS 180-4, examples of SHA-256."""
    assert digest() == digest("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_parts_count_as_one_text_of_bytes() -> None:
    array = np.arange(6.0).reshape(2, 3)
    whole = "ä/".encode() + b"\xff" + array.tobytes()
    assert digest("ä/", "\udcff", array.data) == hashlib.sha256(whole).hexdigest()
    assert sha256(part for part in ("ä/", b"\xff", array.tobytes())) == hashlib.sha256(whole).digest()


def test_a_file_is_read_in_pieces(tmp_path: Path) -> None:
    content = bytes(range(256)) * (hashing.CHUNK // 256) + b"rest"
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file") == hashlib.sha256(content).hexdigest()
