"""Where a WebDataset lies: a pattern, a folder or a list file becomes a list of shards, checked before training."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from qatlab.data.fetch import is_local
from qatlab.errors import QUOTED_SHARDS, UserError

HEAD_THREADS = 16
HEAD_TIMEOUT = 10.0  # seconds
# Answers of servers that serve a file but refuse HEAD, presigned object-store links among them.
HEAD_REFUSED = (403, 405, 501)


def expand_shards(spec: Any) -> list[str]:
    """Return the shards that ``spec`` names, in order, each known to be there.

    ``spec`` is a path or URL with optional braces (``{00000..00331}``), a folder (all its ``*.tar``, sorted), a
    ``.txt`` file with one path or URL per line (relative paths start at the file's folder), or a list of these. Local
    files must exist and http(s) URLs must answer a HEAD request; ``pipe:`` commands and other schemes are taken as
    they are. A folder's compressed shards (``.tar.gz``) must be named by a pattern or a list. Raises UserError when
    nothing is named, nothing is found, or a shard is missing.
    """
    shards = _expanded(spec)
    if not shards:
        raise UserError(
            f"data.shards={spec!r} names no shard; give a folder of .tar files, a list file or, quoted, {QUOTED_SHARDS}."
        )
    _check_files([shard for shard in shards if is_local(shard)])
    _check_urls([shard for shard in shards if shard.startswith(("http://", "https://"))])
    return shards


def _expanded(spec: Any) -> list[str]:
    if spec is None:
        raise UserError(
            f"data.shards is missing: say where the image–caption shards lie, with the quotes: {QUOTED_SHARDS}."
        )
    if isinstance(spec, (str, Path)):
        return _from_text(str(spec).strip())
    if isinstance(spec, Sequence):
        return [shard for part in spec for shard in _expanded(part)]
    raise UserError(
        f"data.shards is {spec!r}; expected text or a list. A pattern with braces needs both quotes: {QUOTED_SHARDS}."
    )


def _from_text(text: str) -> list[str]:
    if not text:
        return []
    if not is_local(text):
        return _braces(text)
    path = Path(text).expanduser()
    if path.is_dir():
        found = sorted(str(file) for file in path.glob("*.tar"))
        if not found:
            raise UserError(
                f"data.shards: the folder {path} holds no .tar file; give the folder of the shards themselves."
            )
        return found
    if path.suffix == ".txt":
        return _from_list_file(path)
    return _braces(str(path))


def _from_list_file(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.shards: the list file {path} cannot be read ({error}).") from error
    shards: list[str] = []
    for line in (line.strip() for line in lines):
        if not line or line.startswith("#"):
            continue
        shards += _braces(str(path.parent / Path(line).expanduser()) if is_local(line) else line)
    if not shards:
        raise UserError(f"data.shards: the list file {path} is empty; write one path or URL per line.")
    return shards


def _braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"data.shards={pattern!r} has an unclosed brace; write it like {QUOTED_SHARDS}.") from error


def _check_files(paths: list[str]) -> None:
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise UserError(
            f"data.shards: {missing[0]} does not exist ({len(missing)} of {len(paths)} local shards are missing); "
            f"check the path and the range, as in {QUOTED_SHARDS}."
        )


def _check_urls(urls: list[str]) -> None:
    with ThreadPoolExecutor(HEAD_THREADS) as pool:
        for url, problem in zip(urls, pool.map(_problem, urls), strict=True):
            if problem:
                pool.shutdown(cancel_futures=True)
                raise UserError(
                    f"data.shards: {url} does not answer ({problem}); check the URL and this machine's network."
                )


def _problem(url: str) -> str | None:
    """Why the URL cannot be read, or None."""
    try:
        _request(url, "HEAD", {})
    except urllib.error.HTTPError as error:
        if error.code not in HEAD_REFUSED:
            return f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    else:
        return None
    try:
        _request(url, "GET", {"Range": "bytes=0-0"})
    except (OSError, ValueError) as error:
        return f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else str(error)
    return None


def _request(url: str, method: str, headers: dict[str, str]) -> None:
    request = urllib.request.Request(url, method=method, headers={"User-Agent": "qatlab", **headers})
    with urllib.request.urlopen(request, timeout=HEAD_TIMEOUT):
        pass
