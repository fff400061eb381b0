"""Addresses and commands without their secrets, so that they may be printed and stored."""

from __future__ import annotations

import re
from typing import Any

from qatlab.core.hashing import digest

HIDDEN = "..."
# "::" ends a URL, because webdataset separates several URLs in one text by it. In brackets "::" belongs to the URL,
# because the host may be an IPv6 address.
_URL = re.compile(
    r"(?P<scheme>\w[\w+.-]*://)(?P<user>[^\s/?'\"]+@)?(?P<place>(?:\[[^]\s]*\])?(?:(?!::)[^\s?'\"])*)"
    r"(?P<query>\?(?:(?!::)[^\s'\"])*)?"
)
_PIPE = re.compile(r"pipe:.*", re.DOTALL)
# A value of a query that names a file, such as part=00001.tar, stays readable, because it tells shards apart.
_FILE = re.compile(r"[\w./{},-]*\.(?:tar|tgz|tar\.\w+|txt)|[\w./-]*\{[\w.,{}]+\}[\w./-]*")
# Small numbers are no secrets. "#<digest>" and "..." are written
# by this module, so a text that was shown stays as it is.
_KNOWN = re.compile(r"\d{0,6}|#[0-9a-f]{8}|\.\.\.")
# Names of parameters that hold a secret or belong to a signature at AWS, Google, CloudFront and Azure (where the fields
# of shared access signatures have two letters).
_SECRET = re.compile(
    r"(?i)pass|pwd|token|secret|signature|auth|cred|expires|policy|x-(?:amz|goog)-|(?:api|access)[-_]?key|"
    r"^(?:sig|key-pair-id|s[eprstv]|srt|spr|sip|sdd|sk[etsv]|skoid|sktid)$"
)
# Names of options that hold a secret, and such an option as it is written on the command line or in a block there.
_NAMES = r"passw|pwd|token|secret|credential|(?:api|access|auth)[-_]?key"
_SECRET_KEY = re.compile(rf"(?i){_NAMES}")
_SECRET_OPTION = re.compile(rf"(?i)(?:{_NAMES})[\w.-]*\s*[:=]\s*[^\s,}}]")
# The forms in which commands take secrets, in this order: a header's value, the word after Bearer or Basic, an option
# or a variable with a telling name, a user with a password (curl -u), a cookie (curl -b).
_VALUE = r"(?P<value>'[^']*'|\"[^\"]*\"|[^\s'\"|;&]+)"
_IN_COMMANDS = [
    re.compile(r"(?P<before>(?:-H|--header)[ =]?\s*(?P<quote>['\"])?[\w-]+\s*:)(?P<value>(?(quote)[^'\"]*|\S*))"),
    re.compile(r"(?i)(?P<before>\b(?:bearer|basic)\s+)(?P<value>[\w.~+/=-]+)"),
    re.compile(
        r"(?i)(?P<before>(?:^|[\s;&|:])-{0,2}[\w-]*(?:password|passwd|pwd|token|secret|api-?_?key|access-?_?key|account-?_?key|"
        rf"bearer|sas|signature|auth|credential)[\w-]*(?:=|\s+)){_VALUE}"
    ),
    re.compile(rf"(?P<before>(?:^|\s)(?:-u|--user|--proxy-user)[ =]?\s*)(?=\S*:){_VALUE}"),
    re.compile(rf"(?P<before>(?:^|\s)(?:-b|--cookie)[ =]?\s*)(?=\S*=){_VALUE}"),
]
# Parts of a value that are no secrets. A value that consists of these alone, such as "Bearer $TOKEN", is kept.
_HARMLESS = re.compile(r"(?i)\$\w+|\$\{\w+\}|\$\([^)]*\)|bearer|basic|token|['\"\s]|\.\.\.")


def shown(text: str) -> str:
    """Return a text without the secrets of the URLs and ``pipe:`` commands in it, for printing, storing and ids.

    A URL loses its user and password. Of its query, values that do not name a file are replaced: by "..." where the
    name of the parameter says secret or signature, because signatures change, and else by a digest, so that two files
    stay two. A command loses the values of headers, and of options and variables that are named like passwords, tokens
    and keys. References to variables ($TOKEN) are no secrets and stay.
    """
    # URLs are replaced first, because a command may hold one. No
    # rule for commands changes a "..." that replaces a secret.
    if "://" in text:
        text = _URL.sub(_url, text)
    if "pipe:" in text:
        text = _PIPE.sub(lambda found: _command(found[0]), text)
    return text


def public(options: Any) -> Any:
    """Return plain options, lists and mappings of them, with every text ``shown``."""
    if isinstance(options, dict):
        return {key: public(value) for key, value in options.items()}
    if isinstance(options, (list, tuple)):
        return type(options)(map(public, options))
    return shown(options) if isinstance(options, str) else options


def concealed(options: Any) -> Any:
    """Return plain options as ``public`` does, and "..." for every text under a key that is called after a secret.

    For options that decide no result, such as those of loggers: two keys would be one value in an id.
    """
    if isinstance(options, dict):
        return {
            key: HIDDEN if isinstance(value, str) and _SECRET_KEY.search(str(key)) else concealed(value)
            for key, value in options.items()
        }
    if isinstance(options, (list, tuple)):
        return type(options)(map(concealed, options))
    return public(options)


def holds_secret(argument: str) -> bool:
    """Return whether an argument of the command line holds an address, a command or an option with a secret."""
    return shown(argument) != argument or _SECRET_OPTION.search(argument) is not None


def _url(found: re.Match[str]) -> str:
    query = found["query"] or ""
    if query:
        query = "?" + "&".join(map(_parameter, query[1:].split("&")))
    return f"{found['scheme']}{HIDDEN + '@' if found['user'] else ''}{found['place']}{query}"


def _parameter(text: str) -> str:
    """Return one parameter of a query as it may be shown: as it is, with "..." or with a digest for its value."""
    name, equals, value = text.partition("=")
    if not equals:  # the parameter is a bare value, a token perhaps or a file
        name, value = "", text
    if _FILE.fullmatch(value) or (_KNOWN.fullmatch(value) and not _SECRET.search(name)):
        return text
    if not name or _SECRET.search(name):
        return f"{name}{equals}{HIDDEN}"
    # Ids are made of shown texts: with a digest ?file=a and ?file=b stay two data sets.
    return f"{name}=#{digest(value)[:8]}"


def _command(text: str) -> str:
    for pattern in _IN_COMMANDS:
        text = pattern.sub(_argument, text)
    return text


def _argument(found: re.Match[str]) -> str:
    kept = not _HARMLESS.sub("", found["value"])  # the value is a reference such as $TOKEN and no secret
    return found[0] if kept else f"{found['before']}{HIDDEN}"
