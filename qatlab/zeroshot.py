"""Class names and prompts become text features, once per text tower, class list and templates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.transformer import text_global_pool
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from qatlab.cache import cache_dir, once
from qatlab.clip import Clip
from qatlab.data.prompts import prompts
from qatlab.errors import UserError, nearest


@dataclass(frozen=True)
class Classes:
    """A zero-shot head: ``features`` (C, D) float32 unit vectors, ``names`` in label order, ``prompts`` for the results."""

    features: Tensor
    names: list[str]
    prompts: str


def class_features(clip: Clip, names: list[str] | None, templates: str | Sequence[str], cache: bool = True) -> Classes:
    """Return the zero-shot head: per class the mean of its prompts' unit embeddings, made unit again.

    ``templates`` as in ``qatlab.data.prompts.prompts``: a packaged set by name, one template, or several. Without a text
    tower the rows come from ``model.text_features``, and ``names``, where given, pick among them. Raises UserError when
    there is neither, or a name is missing from the table. Source: Radford et al. 2021, section 3.1.4.
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
    chosen = prompts(templates)
    text = chosen.of(names)

    def means() -> Tensor:
        encoded = encode_text(clip, [prompt for of_class in text for prompt in of_class])
        return _unit(encoded.unflatten(0, (len(names), -1)).mean(1))

    return Classes(_cached(clip, text, means, cache), names, chosen.name)


def text_features(clip: Clip, texts: list[str], cache: bool = True) -> Tensor:
    """Return unit text features (N, D) float32 of texts that are no classes, such as negative labels.

    Raises UserError without a text tower.
    """
    if clip.model is None or clip.tokenizer is None:
        raise UserError(
            f"the checkpoint has no text tower, so {len(texts)} texts (first {texts[0]!r}) cannot be encoded: give one with "
            "both towers, or leave out the scores that compare with negative texts (neglabel, generic_negative)."
        )
    return _cached(clip, texts, lambda: encode_text(clip, texts), cache)


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
    """Return unit text features (N, D) float32 on the CPU, without gradient.

    Texts are sorted by length, and each batch of a causal tower is cut at its longest: what follows the end of a text
    cannot change its features, so they are those of the whole context to about 1e-6.
    """
    model: Any = clip.model
    assert clip.tokenizer is not None
    clip.text_calls += 1
    device = next(model.parameters()).device
    tokens = torch.cat([clip.tokenizer(texts[i : i + 4096]) for i in range(0, len(texts), 4096)])
    order, encoded = [], []
    for rows, length in cut_batches(model, tokens, batch_size):
        order.append(rows)
        encoded.append(_unit(_encode(model, tokens[rows, :length].to(device)).float()).cpu())
    return torch.cat(encoded)[torch.cat(order).argsort()]


def cut_batches(model: Any, tokens: Tensor, batch_size: int) -> Iterator[tuple[Tensor, int]]:
    """Yield the rows (B,) of each batch of ``tokens`` (N, L), shortest texts first, and how many tokens of it are needed."""
    text = _causal(model)
    if text is None:
        lengths = torch.full((len(tokens),), tokens.shape[1])
    else:
        places = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
        # the pooling itself tells which place it reads
        ends = text_global_pool(places[..., None], tokens, *_pooling(text))
        lengths = ends.flatten() + 1
    for rows in lengths.argsort(stable=True).split(batch_size):
        yield rows, int(lengths[rows].max())


class _Text(nn.Module):
    """The text side of an open_clip model as a module, for functional_call."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)


def _encode(model: Any, tokens: Tensor) -> Tensor:
    """Return ``model.encode_text`` of tokens that may be shorter than the context, which open_clip's own refuses."""
    text, length = _causal(model), tokens.shape[1]
    if text is None or length == len(text.positional_embedding):
        return model.encode_text(tokens)
    path = "model." if text is model else "model.text."
    shorter = {
        f"{path}positional_embedding": text.positional_embedding[:length],
        f"{path}attn_mask": text.attn_mask[:length, :length],
    }
    return functional_call(_Text(model), shorter, (tokens,))


def _causal(model: Any) -> Any:
    """Return the module that holds the text tower if a text's features do not depend on what follows its end, else None."""
    text = getattr(model, "text", model)
    mask, pooling = getattr(text, "attn_mask", None), _pooling(text)[0]
    if mask is None or pooling not in ("argmax", "eos") or getattr(text, "cls_emb", None) is not None:
        return None
    later = torch.ones_like(mask, dtype=torch.bool).triu(1)
    return text if bool(mask[later].isneginf().all()) else None


def _pooling(text: Any) -> tuple[str | None, int | None]:
    """Return open_clip's name for where a text's feature is read, and the id of the end token."""
    if hasattr(text, "text_pool_type"):
        return text.text_pool_type, text.text_eos_id
    return getattr(text, "pool_type", None), getattr(text, "eos_id", None)


def _cached(clip: Clip, text: Any, make: Callable[[], Tensor], cache: bool) -> Tensor:
    """Return ``make()``, or what it gave before for the same text and text tower."""
    if not cache:
        return make()
    path = cache_dir("text") / f"{_fingerprint(clip, text)}.safetensors"
    once(path, lambda temporary: save_file({"features": make()}, temporary))
    return load_file(path)["features"]


def _unit(features: Tensor) -> Tensor:
    return nn.functional.normalize(features, dim=-1)


def _fingerprint(clip: Clip, text: Any) -> str:
    """Hash the prompts and the text tower, its weights and what they do not tell, but not the path it was loaded from."""
    assert clip.model is not None
    digest = hashlib.sha256(json.dumps([text, clip.facts["model"], clip.facts["activation"]]).encode())
    for name, tensor in sorted(clip.model.state_dict().items()):
        if not name.startswith(("visual.", "logit_")):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
