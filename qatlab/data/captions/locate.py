"""The shards of a WebDataset: a pattern, a folder or a list file is expanded to a list of shards, which is checked."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from braceexpand import alphabet, braceexpand

from qatlab.core.errors import QUOTED_SHARDS, UserError
from qatlab.core.files import user_path
from qatlab.core.limits import limits
from qatlab.core.secrets import HIDDEN, public, shown
from qatlab.data.storage.fetch import is_local

# "::" joins shards, but not inside brackets, where it is a part of an IPv6 address: http://[::1]/
_JOIN = re.compile(r"::(?![^\[]*\])")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?")
HEAD_THREADS = 16
HEAD_TIMEOUT = 10.0  # seconds in which a server has to answer
# Answers to HEAD of servers that do serve the file: links that are signed for GET alone give 403, others 405 or 501.
HEAD_REFUSED = (403, 405, 501)


def expand_shards(spec: Any) -> list[str]:
    """Return the paths, URLs and commands of the shards that ``spec`` names, in order, after it was checked that they exist.

    ``spec`` is a path or URL with optional braces (``{00000..00331}``), a folder (all its ``*.tar``, sorted), a
    ``.txt`` file with one path or URL per line (relative paths start at the file's folder; no ``pipe:``), several of
    these joined by ``::``, or a list. Local files must exist and http(s) URLs must answer a HEAD request; ``pipe:``
    commands and other schemes are not checked. A folder's compressed shards (``.tar.gz``) must be named by a pattern or
    a list. Raises UserError when nothing is named, nothing is found, a shard is missing, or a pattern stands for more
    than limits.names.
    """
    shards = _expanded(spec)
    if not shards:
        raise UserError(
            f"data.shards={public(spec)!r} names no shard; give a folder of .tar files, a list file or, quoted, {QUOTED_SHARDS}."
        )
    # All shards are checked before training, so that a missing one costs seconds and not hours.
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
    """Return the shards of one text; ``::`` joins several, as in webdataset and open_clip."""
    return [shard for part in _JOIN.split(text) if part.strip() for shard in _from_part(part.strip())]


def _from_part(text: str) -> list[str]:
    if not is_local(text):
        return _braces(text)
    path = user_path(text)
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".txt":
        return _from_list_file(path)
    return _braces(str(path))


def _from_folder(path: Path) -> list[str]:
    try:
        # Hidden files are left out: macOS puts a ._0.tar beside each 0.tar on foreign disks, and it is no tar.
        names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"data.shards: the folder {path} cannot be listed ({error.strerror}).") from error
    found = [str(path / name) for name in names if name.lower().endswith(".tar")]
    if not found:
        # Compressed shards must be named: each is unpacked into the cache, which a user should choose knowingly.
        packed = next((name for name in names if ".tar." in name.lower() or name.lower().endswith(".tgz")), None)
        remedy = (
            f"name compressed ones by a pattern ({packed})" if packed else "give the folder of the shards themselves"
        )
        raise UserError(f"data.shards: the folder {path} holds no .tar file; {remedy}.")
    return found


def _from_list_file(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.shards: the list file {path} cannot be read ({error}).") from error
    shards: list[str] = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line or line.startswith("#"):
            continue
        if line.startswith("pipe:"):
            raise UserError(
                f"data.shards: {path}, line {number}, is a command (pipe:), and a file that may come from elsewhere runs "
                "none: give commands in data.shards itself, as text or as a list."
            )
        shards += _braces(str(path.parent / user_path(line)) if is_local(line) else line)
    if not shards:
        raise UserError(f"data.shards: the list file {path} is empty; write one path or URL per line.")
    return shards


def _braces(pattern: str) -> list[str]:
    # The names are counted before the pattern is expanded, because the expansion of {0..999999999} would fill the
    # memory.
    if (count := count_names(pattern)) > (bound := limits().names):
        raise UserError(
            f"data.shards: {shown(pattern)} stands for {count} names, above limits.names={bound}; check its ranges."
        )
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(
            f"data.shards={shown(pattern)!r} has an unclosed brace; write it like {QUOTED_SHARDS}."
        ) from error


def count_names(pattern: str) -> int:
    """Return how many names ``braceexpand`` makes of a pattern, without making them; 1 where its braces are not closed."""
    # Pairs of braces that stand side by side multiply their names; nested ones are counted by the recursion.
    count, depth, start = 1, 0, 0
    for place, sign in _signs(pattern):
        if sign == "{":
            start = place + 1 if depth == 0 else start
            depth += 1
        elif sign == "}":
            depth -= 1
            if depth == 0:
                count *= _count_in_braces(pattern[start:place])
        if depth < 0:
            return 1
    return count if depth == 0 else 1


def _count_in_braces(text: str) -> int:
    """Return how many names a text between braces stands for: those of a range, or those between commas, else 1."""
    if found := _RANGE.fullmatch(text):
        first, last = int(found[1]), int(found[2])
        # A step of 0 counts as 1, as in braceexpand.
        return abs(last - first) // (int(found[3] or 1) or 1) + 1
    if found := _LETTERS.fullmatch(text):
        return abs(alphabet.index(found[2]) - alphabet.index(found[1])) // (int(found[3] or 1) or 1) + 1
    # Names between commas add up; commas inside inner braces belong to those.
    parts, depth, start = [], 0, 0
    for place, sign in _signs(text):
        depth += {"{": 1, "}": -1}.get(sign, 0)
        if sign == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return sum(map(count_names, [*parts, text[start:]]))


def _signs(text: str) -> Iterator[tuple[int, str]]:
    r"""Yield (place, sign) of the braces and commas of a text, without those behind a backslash."""
    # The pattern also matches a backslash with the letter after it; such a match has two letters and is passed over.
    for found in re.finditer(r"\\.|[{},]", text, re.DOTALL):
        if len(found[0]) == 1:
            yield found.start(), found[0]


def _check_files(paths: list[str]) -> None:
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise UserError(
            f"data.shards: {missing[0]} does not exist ({len(missing)} of {len(paths)} local shards are missing); "
            f"{_hint(missing[0])}."
        )


def _hint(path: str) -> str:
    """Return advice for a path that does not exist, by the mistake that it looks like."""
    if re.search(r"[*?]|\[.+\]", path):
        return f"wildcards are not expanded here: give the folder, or braces, as in {QUOTED_SHARDS}"
    if found := re.search(r"\.tar(\.\w+)?([,;|]|\s)", path):
        return f"it looks like several, with {found[2]!r} between: join them by '::' or write a list, data.shards=[a.tar,b.tar]"
    return f"check the path and the range, as in {QUOTED_SHARDS}"


def _check_urls(urls: list[str]) -> None:
    # A data set may have hundreds of URLs, and each request waits for its server, so several are sent at once. The
    # error names the first URL in order that fails.
    with ThreadPoolExecutor(HEAD_THREADS) as pool:
        for url, problem in zip(urls, pool.map(_problem, urls), strict=True):
            if problem:
                pool.shutdown(cancel_futures=True)
                remedy = "check the URL and this machine's network"
                if HIDDEN in url:
                    remedy = (
                        "it is of a stored run, whose signature is not stored: the command of the run itself has it"
                    )
                raise UserError(f"data.shards: {shown(url)} does not answer ({problem}); {remedy}.")


def _problem(url: str) -> str | None:
    """Return why the URL cannot be read, or None."""
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
        # One byte by GET tells whether the file is there, where the server refuses HEAD.
        _request(url, "GET", {"Range": "bytes=0-0"})
    except (OSError, ValueError) as error:
        return f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else str(error)
    return None


def _request(url: str, method: str, headers: dict[str, str]) -> None:
    request = urllib.request.Request(url, method=method, headers={"User-Agent": "qatlab", **headers})
    with urllib.request.urlopen(request, timeout=HEAD_TIMEOUT):
        pass
