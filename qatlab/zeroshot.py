"""Class names and prompts become text features, once per text tower, class list and templates."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qatlab.cache import atomic, cache_dir
from qatlab.clip import Clip
from qatlab.errors import UserError, nearest


@dataclass(frozen=True)
class Classes:
    """A zero-shot head: ``features`` (C, D) float32 unit vectors, ``names`` in label order, ``prompts`` for the results."""

    features: Tensor
    names: list[str]
    prompts: str


def class_features(clip: Clip, names: list[str] | None, templates: list[str], cache: bool = True) -> Classes:
    """Return the zero-shot head: per class the mean of its prompts' unit embeddings, made unit again.

    Without a text tower the rows come from ``model.text_features``, and ``names``, where given, pick among them. Raises
    UserError when there is neither, or a name is missing from the table. Source: Radford et al. 2021, section 3.1.4.
    """
    if clip.text_table is not None:
        return _from_table(clip, names)
    if names is None:
        raise UserError(
            "the suite names no classes: give suite.class_names, or model.text_features with the names beside it."
        )
    if clip.model is None or clip.tokenizer is None:
        raise UserError(
            "the checkpoint has no text tower, so class prompts cannot be encoded: give model.text_features=FILE.safetensors:TABLE."
        )
    if not all("{}" in template for template in templates):
        raise UserError(f"suite.templates={templates}: each needs a {{}} where the class name goes.")
    text = [[template.format(name) for template in templates] for name in names]
    path = cache_dir("text") / f"{_fingerprint(clip, text)}.safetensors"
    if cache and path.exists():
        features = load_file(path)["features"]
    else:
        encoded = encode_text(clip, [prompt for prompts in text for prompt in prompts])
        features = _unit(encoded.unflatten(0, (len(names), -1)).mean(1))
        if cache:
            with atomic(path) as temporary:
                save_file({"features": features}, temporary)
    label = templates[0] if len(templates) == 1 else f"{len(templates)} templates"
    return Classes(features, names, label)


def _from_table(clip: Clip, names: list[str] | None) -> Classes:
    table = clip.text_table
    assert table is not None
    if names is None or names == table.names:
        return Classes(table.features, table.names, table.source)
    for name in names:
        if (found := table.names.count(name)) != 1:
            raise UserError(
                f"model.text_features has {found} rows for suite.class_names' {name!r}{nearest(name, table.names)}."
            )
    rows = [table.names.index(name) for name in names]
    return Classes(table.features[rows], names, table.source)


@torch.no_grad()
def encode_text(clip: Clip, texts: list[str], batch_size: int = 256) -> Tensor:
    """Return unit text features (N, D) float32 on the CPU, without gradient."""
    model: Any = clip.model
    assert clip.tokenizer is not None
    device = next(model.parameters()).device
    chunks = [clip.tokenizer(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]
    return torch.cat([_unit(model.encode_text(tokens.to(device)).float()).cpu() for tokens in chunks])


def _unit(features: Tensor) -> Tensor:
    return nn.functional.normalize(features, dim=-1)


def _fingerprint(clip: Clip, text: list[list[str]]) -> str:
    """Hash the prompts and the text tower, its weights and what they do not tell, but not the path it was loaded from."""
    assert clip.model is not None
    digest = hashlib.sha256(json.dumps([text, clip.facts["model"], clip.facts["activation"]]).encode())
    for name, tensor in sorted(clip.model.state_dict().items()):
        if not name.startswith(("visual.", "logit_")):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
