"""Text tables: class embeddings in a file, for models without a text tower."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qatlab.core.errors import UserError, nearest
from qatlab.core.files import atomic, user_path
from qatlab.data.textfiles import parse_json, read_json


@dataclass(frozen=True, eq=False)
class TextTable:
    """One embedding per class: ``features`` (C, D) float32 unit rows, the C ``names``, and their ``source``."""

    features: Tensor
    names: list[str]
    source: str


def load_text_table(spec: str) -> TextTable:
    """Return the table that "PATH.safetensors:TABLE" names; ``:TABLE`` may be left out when the file holds one.

    Rows are brought to unit length in float32. Names come from the file's metadata key ``names`` or from a JSON file
    beside it, ``<stem>.json`` or ``<stem>_names.json``; an ending ``_fp16`` or ``_fp32`` of the stem may be left out.
    The names are a list, or a dict keyed by the table's name or by the part of this name before the first dot. Raises
    UserError for a missing file or table, for missing names or a wrong number of them, and for rows that are zero or
    not finite.
    """
    path, wanted = _split(spec)
    try:
        with safe_open(path, framework="pt") as file:
            table = _table_name(path, wanted, list(file.keys()))
            raw = file.get_tensor(table)
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"The text table {path} cannot be read: {error}.") from error
    source = f"{path.name}:{table}"
    features = _unit_rows(raw, source)
    names = _names(path, table, metadata)
    if len(names) != len(features):
        raise UserError(f"{source} has {len(features)} rows but {len(names)} names; give each row its class name.")
    return TextTable(features, names, source)


def save_text_table(path: str | Path, tables: Mapping[str, TextTable]) -> None:
    """Write ``tables`` {name: table} to one safetensors file for ``load_text_table``; class names are in its metadata.

    Raises UserError when a table's rows and names differ in number, or a row is zero or not finite.
    """
    for key, table in tables.items():
        if len(table.names) != len(table.features):
            raise UserError(f"The table '{key}' has {len(table.features)} rows but {len(table.names)} names.")
    # Rows are checked before the file is written, so that no table is left on disk that cannot be read back.
    tensors = {key: _unit_rows(table.features, key) for key, table in tables.items()}
    names = json.dumps({key: table.names for key, table in tables.items()})
    with atomic(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={"names": names})


def _split(spec: str) -> tuple[Path, str | None]:
    # Only a colon behind the suffix separates the table, because a path may contain colons.
    match = re.fullmatch(r"(.+\.safetensors)(?::(.*))?", str(spec))
    if match is None:
        raise UserError(f"'{spec}' names no text table; write PATH.safetensors:TABLE.")
    path = user_path(match[1])
    if not path.is_file():
        raise UserError(f"The text table {path} does not exist; check the path in '{spec}'.")
    return path, match[2] or None


def _table_name(path: Path, wanted: str | None, present: list[str]) -> str:
    if wanted is None and len(present) == 1:
        return present[0]
    tables = ", ".join(present)
    if wanted is None:
        raise UserError(f"{path} holds {len(present)} tables; name one as {path.name}:TABLE. There are: {tables}.")
    if wanted not in present:
        raise UserError(f"{path} holds no table '{wanted}'{nearest(wanted, present)}. There are: {tables}.")
    return wanted


def _unit_rows(raw: Tensor, source: str) -> Tensor:
    if raw.ndim != 2 or not raw.is_floating_point():
        raise UserError(
            f"{source} is {str(raw.dtype)[6:]} of shape {tuple(raw.shape)}; expected (classes, dimensions) of floats."
        )
    # Rows in half precision become float32 first, because in float16 their length would be rounded to 1e-3.
    features = raw.float()
    lengths = features.norm(dim=1, keepdim=True)
    bad = (~torch.isfinite(lengths) | (lengths == 0)).flatten().nonzero().flatten()
    if len(bad):
        raise UserError(
            f"{source}: row {int(bad[0])} is zero or not finite ({len(bad)} such rows); compute the embeddings again."
        )
    # safetensors refuses to write a view that is not contiguous.
    return (features / lengths).contiguous()


def _names(path: Path, table: str, metadata: dict[str, str]) -> list[str]:
    if "names" in metadata:
        return _chosen(parse_json(metadata["names"], f"{path} (metadata 'names')"), table, path)
    # A file of names is often shared by a table in fp16 and in fp32, and then has a name without this ending.
    stems = dict.fromkeys([path.stem, re.sub(r"_fp(16|32)$", "", path.stem)])
    beside = [path.with_name(f"{stem}{ending}.json") for stem in stems for ending in ("", "_names")]
    for file in beside:
        if file.is_file():
            return _chosen(read_json(file), table, file)
    raise UserError(f"{path} has no class names; write them beside it as a JSON list in {beside[-1].name}.")


def _chosen(content: Any, table: str, where: Path) -> list[str]:
    """Return the class names of one table from the content of a JSON file."""
    if isinstance(content, dict):
        # Tables whose names differ only behind the first dot, for example by their prompts, share one list of class
        # names.
        keys = [key for key in (table, table.split(".")[0]) if key in content]
        if not keys:
            raise UserError(f"{where} has no names for the table '{table}'; it has: {', '.join(content)}.")
        content = content[keys[0]]
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise UserError(f"The names of '{table}' in {where} must be a JSON list of text.")
    return content
