"""The blocks of text encoders from transformers: which layers read one input, and the tensors that make that input.

transformers is optional, so classes are known by their names and not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from qatlab.towers.structure import joined


class Reading(NamedTuple):
    """The ``layers``, by name in the model, that read one input, and the ``makers`` whose rows or elements make that input.

    ``group`` is that of an ``Edge``.
    """

    group: str
    layers: dict[str, nn.Linear]
    makers: tuple[Tensor, ...]


def readings(model: nn.Module) -> Iterator[Reading]:
    """Yield the readings of all known blocks in ``model`` whose input a factor of each channel can be divided out of."""
    for name, module in model.named_modules():
        of_block = _BLOCKS.get(type(module).__name__)
        if of_block is not None:
            yield from of_block(module, name)


def _m2m(block: Any, name: str) -> Iterator[Reading]:
    """Yield the readings of a block of NLLB: norms stand before the attention and before the mlp."""
    attention = block.self_attn
    projections = _named(attention, joined(name, "self_attn"), "q_proj", "k_proj", "v_proj")
    yield Reading("in_proj", projections, _tensors(block.self_attn_layer_norm))
    yield Reading("out_proj", _named(attention, joined(name, "self_attn"), "out_proj"), _tensors(attention.v_proj))
    yield Reading("c_fc", _named(block, name, "fc1"), _tensors(block.final_layer_norm))
    # A factor that is positive passes a ReLU, and no other activation function that is used here.
    if isinstance(block.activation_fn, nn.ReLU):
        yield Reading("c_proj", _named(block, name, "fc2"), _tensors(block.fc1))


def _t5_attention(part: Any, name: str) -> Iterator[Reading]:
    """Yield the readings of the first half of a block of T5: a norm and an attention."""
    attention, inside = part.SelfAttention, joined(name, "SelfAttention")
    yield Reading("in_proj", _named(attention, inside, "q", "k", "v"), _tensors(part.layer_norm))
    yield Reading("out_proj", _named(attention, inside, "o"), _tensors(attention.v))


def _t5_mlp(part: Any, name: str) -> Iterator[Reading]:
    """Yield the readings of the second half of a block of T5: a norm and an mlp, with a gate or without."""
    mlp, inside = part.DenseReluDense, joined(name, "DenseReluDense")
    gated = hasattr(mlp, "wi_1")
    first = ("wi_0", "wi_1") if gated else ("wi",)
    yield Reading("c_fc", _named(mlp, inside, *first), _tensors(part.layer_norm))
    if gated:
        # The activation function stands behind wi_0, and its output is multiplied with that of wi_1.
        yield Reading("c_proj", _named(mlp, inside, "wo"), _tensors(mlp.wi_1))


def _bert(block: Any, name: str) -> Iterator[Reading]:
    """Yield the reading of a block of BERT that a factor passes: norms stand behind its layers, and a GELU in its mlp."""
    output = _named(block.attention.output, joined(name, "attention.output"), "dense")
    yield Reading("out_proj", output, _tensors(block.attention.self.value))


_BLOCKS: dict[str, Callable[[Any, str], Iterator[Reading]]] = {
    "M2M100EncoderLayer": _m2m,
    "MT5LayerSelfAttention": _t5_attention,
    "MT5LayerFF": _t5_mlp,
    "T5LayerSelfAttention": _t5_attention,
    "T5LayerFF": _t5_mlp,
    "BertLayer": _bert,
    "RobertaLayer": _bert,
    "XLMRobertaLayer": _bert,
}


def _named(owner: nn.Module, name: str, *layers: str) -> dict[str, nn.Linear]:
    """Return the ``layers`` of ``owner``, which is called ``name`` in the model, by their own names in the model."""
    return {joined(name, layer): owner.get_submodule(layer) for layer in layers}  # type: ignore[misc]


def _tensors(module: Any) -> tuple[Tensor, ...]:
    """Return the weight and, where there is one, the bias of a norm or of a linear layer."""
    bias = getattr(module, "bias", None)
    return (module.weight,) if bias is None else (module.weight, bias)
