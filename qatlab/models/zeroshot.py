"""Class names and prompts become text features, once per text tower, class list and templates."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from qatlab.core.checksums import read_tensors, write_tensors
from qatlab.core.damage import whole
from qatlab.core.errors import UserError, nearest
from qatlab.core.files import cache_dir, once
from qatlab.core.hashing import digest
from qatlab.models.clip import Clip
from qatlab.models.fingerprint import fingerprint, lasting_module, plain_options
from qatlab.models.prompts import prompts
from qatlab.towers.open_clip_text import causal_text

SAMPLE = 256  # texts whose tokens tell one tokenizer from another


@dataclass(frozen=True)
class Classes:
    """A zero-shot head: ``features`` (C, D) float32 unit vectors, ``names`` in label order, ``prompts`` for the results."""

    features: Tensor
    names: list[str]
    prompts: str


def class_features(clip: Clip, names: list[str] | None, templates: str | Sequence[str], cache: bool = True) -> Classes:
    """Return the zero-shot head: per class the mean of its prompts' unit embeddings, made unit again.

    ``templates`` as in ``qatlab.models.prompts.prompts``: a packaged set by name, one template, or several. Without a text
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
        """Return the unit means (C, D) of the classes' prompts."""
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
    """Return the head of the rows of the text table that ``names`` pick, all of them where they name its own classes."""
    table = clip.text_table
    assert table is not None
    if names is None or names == table.names:
        return Classes(table.features, table.names, table.source)
    for name in names:
        # Two rows of one name are as wrong as none, such as ImageNet's two cranes: nothing says which of them is meant.
        if (found := table.names.count(name)) != 1:
            raise UserError(
                f"model.text_features has {found} rows for suite.class_names' {name!r}{nearest(name, table.names)}."
            )
    rows = [table.names.index(name) for name in names]
    return Classes(table.features[rows], names, table.source)


@torch.no_grad()
def encode_text(clip: Clip, texts: list[str], batch_size: int = 256) -> Tensor:
    """Return unit text features (N, D) float32 on the CPU, without gradient.

    Texts are sorted by length, and each batch of a causal tower is cut after its longest text. In such a tower the tokens
    after the end of a text cannot change its features, which equal those of the whole context to about 1e-6.
    """
    model: Any = clip.model
    assert clip.tokenizer is not None
    clip.text_calls += 1
    device = next(model.parameters()).device
    tokens = torch.cat([clip.tokenizer(texts[i : i + 4096]) for i in range(0, len(texts), 4096)])
    order, encoded = [], []
    for batch, length in cut_batches(model, tokens, batch_size):
        order.append(batch)
        encoded.append(_unit(_encode(model, tokens[batch, :length].to(device)).float()).cpu())
    # Back from the order of lengths to the order of the texts.
    return torch.cat(encoded)[torch.cat(order).argsort()]


def cut_batches(model: Any, tokens: Tensor, batch_size: int) -> Iterator[tuple[Tensor, int]]:
    """Yield the places (B,) int64 of each batch of ``tokens`` (N, L), shortest texts first, and the tokens it needs."""
    text = causal_text(model)
    # A tower that is not causal reads the padding too: it needs the whole context.
    lengths = torch.full((len(tokens),), tokens.shape[1]) if text is None else text.ends(tokens) + 1
    # Stable, so that the batches, and with them the last bits of the features, are the same on every machine.
    for batch in lengths.argsort(stable=True).split(batch_size):
        yield batch, int(lengths[batch].max())


class _Text(nn.Module):
    """The text tower of an open_clip model as the forward of a module, which is all that functional_call can call."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)


def _encode(model: Any, tokens: Tensor) -> Tensor:
    """Return the text features (B, D) of tokens (B, L) that may be shorter than the context, which open_clip refuses."""
    # open_clip adds the positional embeddings and the causal mask of the whole context. For this call, and without a change
    # of the model, both are replaced by their first ``length`` entries.
    text, length = causal_text(model), tokens.shape[1]
    if text is None or length == text.context:
        return model.encode_text(tokens)
    path = "model." if text.module is model else "model.text."
    shorter = {f"{path}{name}": tensor for name, tensor in text.shortened(length).items()}
    return functional_call(_Text(model), shorter, (tokens,))


def _cached(clip: Clip, text: Any, make: Callable[[], Tensor], cache: bool) -> Tensor:
    """Return ``make()``, text features (N, D), or those that it gave before for the same text and text tower."""
    if not cache:
        return make()
    path = cache_dir("text") / f"{_fingerprint(clip, text)}.safetensors"
    for _ in range(2):  # twice, because ``whole`` may move a damaged file aside the first time
        once(path, lambda temporary: write_tensors(temporary, {"features": make()}))
        if (features := whole(path, _read_features)) is not None:
            return features
    return make()  # the file is damaged and cannot be set aside, or another process keeps removing it


def _read_features(path: Path) -> Tensor:
    # A file without a checksum, of an earlier release, may be damaged without a sign of it: it is made again.
    return read_tensors(path, unmarked=False)[0]["features"]


def _unit(features: Tensor) -> Tensor:
    return nn.functional.normalize(features, dim=-1)


def _fingerprint(clip: Clip, text: Any) -> str:
    """Return 32 hex digits of a hash of the prompts, the tokenizer and the text tower, its structure and its weights."""
    # The name and file of the tower are left out, because the same weights under another name give the same features.
    assert clip.model is not None
    flat = [prompt for of_class in text for prompt in of_class] if text and isinstance(text[0], list) else text
    # The image tower, and the scale and bias of the logits, have no part in text features.
    tower = fingerprint(clip.model, without=("visual", "logit_scale", "logit_bias"))
    return digest(json.dumps([text, _tokens(clip.tokenizer, flat), tower]))[:32]


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[Any]:
    """Return a description that identifies a tokenizer: its class, its options, and its tokens of some ``texts``.

    The tokens of all texts would take a quarter of a minute for the 80 templates of ImageNet.
    """
    some = texts[:: max(1, len(texts) // SAMPLE)]
    options = {} if inspect.isroutine(tokenizer) else plain_options(tokenizer)
    kind = tokenizer if inspect.isroutine(tokenizer) else type(tokenizer)
    return [lasting_module(kind), kind.__qualname__, options, tokenizer(list(some)).tolist() if some else []]
