"""Files with a checksum of their content: tensors, JSON, tables, lines. Reading a changed file raises ValueError."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from qatlab.core.hashing import Part, digest, sha256

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUM = "checksum"
_IN_LINE = f', "{CHECKSUM}": "'
_IN_TABLE, _NO_HASH = b"sha256 of the rest: ", b"0" * 64


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write tensors, and what there is to say ``about`` them, as a .safetensors file."""
    from safetensors.torch import save_file  # imports torch, which readers of tables and lines do not need

    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(kept, path, {**(about or {}), CHECKSUM: _of_tensors(kept, about or {})})
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a .safetensors file, which safetensors writes in a random order.

    Files of equal content are to be equal byte for byte.
    """
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # a longer header would overwrite the first tensor
            file.seek(8)
            file.write(text.ljust(size))


def read_tensors(path: Path, unmarked: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a .safetensors file, and the metadata that stands beside them.

    Raises ValueError for a wrong checksum, and for a missing one (as in files of earlier releases) unless ``unmarked``
    files are accepted; SafetensorError for a file that is cut short.
    """
    from safetensors.torch import load

    content = path.read_bytes()  # mapped tensors would change, or end the process, with the file
    tensors = load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    about = dict(header.get("__metadata__") or {})
    stored = about.pop(CHECKSUM, None)
    _compare(stored, _of_tensors(tensors, about) if stored is not None else None, unmarked)
    return tensors, about


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as JSON with a checksum."""
    path.write_text(json.dumps({**content, CHECKSUM: _of(json.dumps(content))}, indent=1))


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping that ``write_json``, or an earlier release, wrote; raises ValueError for anything else."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__} and no mapping")
    stored = content.pop(CHECKSUM, None)
    _compare(stored, _of(json.dumps(content)))
    return content


def sealed(record: Mapping[str, Any]) -> str:
    """Return a mapping as one line of JSON with a checksum."""
    text = json.dumps(record)
    return f'{text[:-1]}{_IN_LINE}{_of(text)}"}}'


def unsealed(line: bytes) -> dict[str, Any]:
    """Return the mapping of a line that ``sealed``, or an earlier release, wrote; ValueError for anything else."""
    record = json.loads(verified(line))
    if not isinstance(record, dict):
        raise ValueError(f"it holds a {type(record).__name__} and no mapping")
    return record


def verified(line: bytes) -> str:
    """Return the JSON of a line that ``sealed`` wrote, without its checksum; raises ValueError for a wrong one.

    A line of an earlier release has no checksum and is returned as it is.
    """
    body, found, mark = line.strip().rpartition(_IN_LINE.encode())
    if not found:
        return line.decode()
    _compare(mark.decode(), digest(body, b"}")[:16] + '"}')
    return body.decode() + "}"


def write_table(path: Path, table: pl.DataFrame) -> None:
    """Write a table as a Parquet file that holds a checksum of all its other bytes."""
    table.write_parquet(path, metadata={CHECKSUM: (_IN_TABLE + _NO_HASH).decode()})
    content = path.read_bytes()
    path.write_bytes(content.replace(_IN_TABLE + _NO_HASH, _IN_TABLE + digest(content).encode()))


def read_table(path: Path) -> pl.DataFrame:
    """Return the table that ``write_table``, or an earlier release, wrote; ValueError for a file that was changed.

    The checksum is compared before polars reads the bytes, because one wrong bit can make polars abort the process.
    """
    content = path.read_bytes()
    if (place := content.rfind(_IN_TABLE) + len(_IN_TABLE)) >= len(_IN_TABLE):
        stored = content[place : place + len(_NO_HASH)]
        unmarked = content.replace(_IN_TABLE + stored, _IN_TABLE + _NO_HASH)
        _compare(stored.decode(), digest(unmarked))
    return pl.read_parquet(content)


def _compare(stored: str | None, found: str | None, unmarked: bool = True) -> None:
    if stored is None and not unmarked:
        raise ValueError("it has no checksum")
    if stored is not None and stored != found:
        raise ValueError("its checksum is wrong")


def _of(text: str) -> str:
    return digest(text)[:16]


def _of_tensors(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    return sha256(_parts(tensors, about)).hex()[:16]


def _parts(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> Iterator[Part]:
    import torch

    yield json.dumps(about, sort_keys=True)
    for name, tensor in sorted(tensors.items()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        yield tensor.reshape(-1).view(torch.uint8).numpy().data
