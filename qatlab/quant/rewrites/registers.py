"""Cached registers: a tower whose tokens have no outliers, because attention finds what outliers were for elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatlab.core.domains import Count, OneOf, checked
from qatlab.core.errors import UserError
from qatlab.quant.inspect.hooks import on_inputs, on_outputs
from qatlab.quant.layers.attention import RegisteredAttention, calling
from qatlab.quant.layers.registers import Registers, no_registers
from qatlab.quant.layers.walk import device_of, evaluating, quant_layers
from qatlab.quant.ptq.second_moments import HELD_OUT
from qatlab.towers import open_clip_vit
from qatlab.towers.structure import Block

COUNTS = (4, 6, 8, 10, 12, 16, 20, 24, 32)  # numbers of neurons among which a search chooses
NORM = 5.0  # an outlier token's norm, at the least, over the median of all tokens
LARGE = 2.0  # the same of outlier tokens from the first block on before which attention finds registers
DEPTH = 2 / 3  # of the tower, before which outlier tokens have been made


class CachedRegisters:
    """Returns an image tower without outlier tokens, whose attentions find keys and values of such tokens in registers.

    Vision transformers write large, equal vectors into a few patches that say little, and attend to them later on; the
    neurons that write them hold the largest activations of the whole tower. Jiang et al. 2025 (arXiv 2506.08010) let these
    neurons write into an empty token in place of patches; Lee et al. 2025 ("RegCache", arXiv 2510.04547) keep such a
    token's keys and values from earlier on. Here both are joined. Outlier tokens are those whose norm before the last third
    of the blocks is more than NORM times the median. The neurons before that are ranked by |activation| on these tokens,
    times the norm of what they write, and the first of them are taken out of both layers of their mlp. From the block on
    before which the outlier tokens are large, attention finds beside the tokens one register: the mean key and the mean
    value of the outlier tokens, as often as an image has such tokens on average (log n is added to its logits).

    ``neurons`` is how many are taken out; "search" takes the one of COUNTS whose features have the largest mean cosine to
    the full-precision ones on every fourth image, which is left out for that. The outputs change a little, which they do by
    no other rewrite.

    Raises UserError, before anything is changed, for a tower that is not of open_clip's plain transformer blocks, and for
    one without outlier tokens.
    """

    @checked
    def __init__(self, neurons: Count | Annotated[str, OneOf("search")] = "search") -> None:
        self.neurons = neurons

    def prepare(self, visual: nn.Module) -> nn.Module:
        """Return ``visual`` with empty registers in all its attentions; a state dict brings their number."""
        for block in _blocks(visual):
            _put(block, no_registers(_width(block), block.fc2.part.weight))
        return visual

    @torch.no_grad()
    def __call__(self, visual: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
        """Return ``visual``, rewritten in place on the normalised images ``batches`` (B, 3, S, S), which are kept.

        Two passes over the images, and in a search one pass over every fourth of them for each number of neurons.
        """
        blocks = _blocks(visual)
        images = [batch.to(device_of(visual)) for batch in batches if len(batch)]
        if sum(map(len, images)) < 2:
            raise UserError("registers are found on some images and judged on others: give them at least two.")
        kept, held_out = _divided(images)
        with evaluating(visual), calling(visual):
            masks, entered = _outlier_tokens(visual, blocks, kept)
            found = _Found(visual, blocks, kept, masks)
        first = next(place for place, large in enumerate(entered) if large)
        registers = {place: found.registers(place) for place in range(first, len(blocks))}
        taken = found.ranked[: self._searched(visual, registers, found.ranked, held_out)]
        _put_registers(blocks, registers)
        _take_out(blocks, taken)
        return visual

    def _searched(
        self,
        visual: nn.Module,
        registers: dict[int, Registers],
        ranked: Sequence[tuple[int, int]],
        held_out: Sequence[Tensor],
    ) -> int:
        """Return how many of the ``ranked`` neurons are taken out of ``visual``, by its features of the images ``held_out``."""
        if isinstance(self.neurons, int):
            return self.neurons
        cosines: dict[int, float] = {}
        with evaluating(visual):
            full = torch.cat([visual(batch) for batch in held_out])
            trial = copy.deepcopy(visual)
            blocks = _blocks(trial)
            _put_registers(blocks, registers)
            done = 0
            # Each number takes out some neurons more, so that one copy of the tower serves all of them.
            for count in COUNTS:
                _take_out(blocks, ranked[done:count])
                done = count
                features = torch.cat([trial(batch) for batch in held_out])
                cosines[count] = float(F.cosine_similarity(features, full, dim=-1).mean())
        return max(cosines, key=cosines.__getitem__)


class _Found:
    """What one pass over images tells of their outlier tokens: their keys and values, and the neurons that write them."""

    def __init__(
        self, visual: nn.Module, blocks: Sequence[Block], batches: Sequence[Tensor], masks: Sequence[Tensor]
    ) -> None:
        self._sums: list[Any] = [0.0] * len(blocks)
        scores: list[Any] = [0.0] * len(blocks)
        self._tokens, self._images = sum(int(mask.sum()) for mask in masks), sum(map(len, masks))
        current: list[Tensor] = []  # the mask of the batch that runs

        def remember_packed(name: str, layer: nn.Module, given: tuple[Any, ...], packed: Tensor) -> None:
            self._sums[places[name]] = self._sums[places[name]] + packed[current[0]].double().sum(0)

        def remember_hidden(name: str, layer: nn.Module, given: tuple[Any, ...]) -> None:
            activations = _first(given[0], blocks[places[name]])[current[0]]
            scores[places[name]] = scores[places[name]] + activations.abs().double().sum(0)

        places = {f"{block.attention.name}.in_proj": place for place, block in enumerate(blocks)}
        packed = {name: visual.get_submodule(name) for name in places}
        hidden = {block.fc2.name: block.fc2.part for block in blocks}
        places |= {block.fc2.name: place for place, block in enumerate(blocks)}
        with on_outputs(packed, remember_packed), on_inputs(hidden, remember_hidden):
            for mask, images in zip(masks, batches, strict=True):
                current[:] = [mask]
                visual(images)
        written = [block.fc2.part.weight.double().norm(dim=0) for block in blocks]
        early = range(_depth(len(blocks)))
        strength = torch.stack([scores[place] * written[place] for place in early])
        order = strength.flatten().argsort(descending=True, stable=True).tolist()
        # (block, neuron), the strongest first.
        self.ranked = [divmod(place, strength.shape[1]) for place in order]

    def registers(self, place: int) -> Registers:
        """Return the register of the block at ``place``: the mean key and value of outlier tokens, as often as there are any."""
        _, keys, values = (self._sums[place] / self._tokens).float().chunk(3)
        count = torch.tensor([self._tokens / self._images], device=keys.device)
        return Registers(keys[:, None].contiguous(), values[:, None].contiguous(), count.log())


def _blocks(visual: nn.Module) -> list[Block]:
    """Return the blocks of ``visual``; UserError unless it is a tower of open_clip's plain blocks, in full precision."""
    blocks = open_clip_vit.blocks_of(visual) if open_clip_vit.matches(visual) else []
    plain = [block for block in blocks if isinstance(block.attention.part, nn.MultiheadAttention)]
    if not blocks or len(plain) < len(blocks) or quant_layers(visual):
        raise UserError(
            f"registers cannot be put into {type(visual).__name__}: they take a full-precision image tower of open_clip's own "
            "transformer blocks. Meet outliers with quant/rewrite=outlier_channels, smoothquant or rotation."
        )
    return blocks


def _depth(blocks: int) -> int:
    """Return the number of blocks, of so many, in which neurons may write outlier tokens."""
    return max(1, round(DEPTH * blocks))


def _width(block: Block) -> int:
    attention: Any = block.attention.part
    return int(attention.embed_dim)


def _first(x: Tensor, block: Block) -> Tensor:
    """Return the tokens x of ``block`` with the images first, (B, L, ...)."""
    attention: Any = block.attention.part
    return x if attention.batch_first else x.transpose(0, 1)


def _divided(images: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return three quarters of the ``images``, and every fourth of them; of less than four the last one."""
    every = torch.cat(list(images))
    size = len(images[0])
    step = min(HELD_OUT, len(every))
    last = torch.arange(len(every), device=every.device) % step == step - 1
    return list(every[~last].split(size)), list(every[last].split(size))


def _outlier_tokens(
    visual: nn.Module, blocks: Sequence[Block], batches: Sequence[Tensor]
) -> tuple[list[Tensor], list[bool]]:
    """Return which tokens of each batch are outliers, (B, L) each, and of each block whether these are large before it.

    The class token is none. Raises UserError where there are none.
    """
    norms: list[list[Tensor]] = []

    def remember(name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        place = places[name]
        norms[-1].append(_first(given[0], blocks[place]).norm(dim=-1))

    places = {block.name: place for place, block in enumerate(blocks)}
    with on_inputs({block.name: block.module for block in blocks}, remember):
        for images in batches:
            norms.append([])
            visual(images)
    depth = _depth(len(blocks))
    masks = []
    for of_batch in norms:
        late = of_batch[min(depth, len(blocks) - 1)]
        mask = late > NORM * late.median()
        mask[:, 0] = False
        masks.append(mask)
    if not any(bool(mask.any()) for mask in masks):
        raise UserError(
            f"no token before block {depth} of {len(blocks)} is more than {NORM:g} times as large as the median: this tower "
            "has no outlier tokens. Leave registers out."
        )
    large = []
    for place in range(len(blocks)):
        of_outliers = torch.cat([of_batch[place][mask] for of_batch, mask in zip(norms, masks, strict=True)])
        of_all = torch.cat([of_batch[place].flatten() for of_batch in norms])
        large.append(bool(of_outliers.median() > LARGE * of_all.median()))
    return masks, large


def _put(block: Block, registers: Registers) -> None:
    """Give the attention of ``block`` the ``registers``."""
    source: Any = block.attention.part
    block.attention.put(RegisteredAttention(source, registers))


def _put_registers(blocks: Sequence[Block], registers: dict[int, Registers]) -> None:
    """Give all attentions of ``blocks`` registers: those by the block's number, or empty ones."""
    for place, block in enumerate(blocks):
        own = registers.get(place)
        _put(block, no_registers(_width(block), block.fc2.part.weight) if own is None else copy.deepcopy(own))


def _take_out(blocks: Sequence[Block], neurons: Iterable[tuple[int, int]]) -> None:
    """Set to 0 what makes the ``neurons`` (block, neuron) of mlps, and what reads them."""
    for place, neuron in neurons:
        fc1, fc2 = blocks[place].fc1.part, blocks[place].fc2.part
        fc1.weight[neuron] = 0
        if fc1.bias is not None:
            fc1.bias[neuron] = 0
        fc2.weight[:, neuron] = 0
