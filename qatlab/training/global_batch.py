"""One loss over the global batch, for any number of processes and of images that fit into memory at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qatlab.core.ranks import rank, world_size

Batch = dict[str, Any]


def parts_of(batch: Batch, size: int | None) -> list[Batch]:
    """Return ``batch`` cut into parts of ``size`` images, the last one perhaps smaller; None leaves it whole."""
    # A value that is no tensor, such as the number of skipped samples, belongs to no image and is left out.
    rows = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    cut = {name: value.split(size or len(value)) for name, value in rows.items()}
    return [dict(zip(cut, values, strict=True)) for values in zip(*cut.values(), strict=True)]


def gathered(rows: Tensor) -> Tensor:
    """Return ``rows`` (B, ...) of every process, (world B, ...), in order of rank, without gradient."""
    rows = rows.detach().contiguous()
    if world_size() == 1:
        return rows
    everyone = rows.new_empty(world_size() * len(rows), *rows.shape[1:])
    dist.all_gather_into_tensor(everyone, rows)
    return everyone


def averaged(values: Tensor) -> Tensor:
    """Return the mean of ``values`` (of any shape) over the processes, which have equal shares of the batch."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


Rows = dict[str, Tensor]
Terms = dict[str, Tensor]


def in_batch_step(
    parts: list[Batch],
    encode: Callable[[Batch, int], Rows],
    shared: Rows,
    terms_of: Callable[[Rows, Rows], Terms],
    backward: Callable[[Tensor], None],
) -> tuple[Terms, Tensor]:
    """Return the terms of a loss that compares all images of the global batch, and the scalar still to differentiate.

    ``encode(part, i)`` returns the features of a part with their graph; ``terms_of(rows, shared)`` returns the terms,
    "loss" among them, from the features (B, D) of the global batch; ``shared`` are tensors that belong to no image.
    First all features are computed; then the gradients of the loss to the features are carried into the parts, one
    after the other. ``backward`` is called for all parts but the last, whose surrogate loss is returned. Averaged over
    the processes, as by DDP, the gradients are those of one process with the whole batch. Gao et al. 2021 (arXiv
    2101.06983), section 3.2.
    """
    alone = len(parts) == 1
    # A single part keeps its graph and is not encoded again. Of several parts each graph is dropped before the next one
    # is made (no variable may hold it), so that memory needs room for one graph only.
    encoded = [encode(part, i) if alone else _without_graph(encode(part, i)) for i, part in enumerate(parts)]
    leaves: Rows = {}
    for name in encoded[0]:
        features = torch.cat([rows[name] for rows in encoded])
        leaves[name] = gathered(features).requires_grad_()
    fixed = {name: value.detach().requires_grad_(value.requires_grad) for name, value in shared.items()}
    terms = terms_of(leaves, fixed)
    learned = {name: value for name, value in fixed.items() if value.requires_grad}
    found = torch.autograd.grad(terms["loss"], [*leaves.values(), *learned.values()], allow_unused=True)
    gradients = dict(zip([*leaves, *learned], found, strict=True))
    # DDP divides the sum over the processes by their number. A process's features are in its own gradient alone, so
    # they are multiplied by that number first; shared tensors are in every process's gradient and need no factor.
    mine = {name: gradients[name].chunk(world_size())[rank()] * world_size() for name in leaves}
    start = 0
    for i, rows in enumerate(encoded):
        size = len(next(iter(rows.values())))
        # The part is encoded again, now with its graph; dropout is seeded by part, so the features are the same.
        if not alone:
            rows = encode(parts[i], i)
        # The gradient of <features, constant> is the constant, so this sum carries the loss's gradient into the tower.
        surrogate = torch.stack([(rows[name] * mine[name][start : start + size]).sum() for name in rows]).sum()
        start += size
        # The last surrogate is returned: Lightning differentiates it, and DDP then sends the gradients of all parts.
        if i < len(parts) - 1:
            backward(surrogate)
    for name in learned:
        if gradients[name] is not None:
            surrogate = surrogate + (shared[name] * gradients[name]).sum()
    return {name: term.detach() for name, term in terms.items()}, surrogate


def _without_graph(rows: Rows) -> Rows:
    """Return ``rows`` without the graph behind them."""
    # Features are computed with a graph that is dropped, because layers may round differently where gradients are off.
    return {name: value.detach() for name, value in rows.items()}


def summed_step(
    parts: list[Batch], terms_of: Callable[[Batch, int], Terms], backward: Callable[[Tensor], None]
) -> tuple[Terms, Tensor]:
    """Return the terms, each (), of a loss that is a mean over images, and the scalar that is still to differentiate.

    ``terms_of(part, i)`` returns the terms of a part, "loss" among them. ``backward`` is called for all parts but the
    last, so that their gradients add up. The returned terms are means over all processes.
    """
    sizes = [len(next(iter(part.values()))) for part in parts]
    total: Terms = {}
    for i, part in enumerate(parts):
        # Each part is weighted by its size, because the last part may be smaller.
        terms = {name: term * (sizes[i] / sum(sizes)) for name, term in terms_of(part, i).items()}
        total = {name: term.detach() + total.get(name, 0.0) for name, term in terms.items()}
        if i < len(parts) - 1:
            backward(terms["loss"])
    means = averaged(torch.stack(list(total.values())))
    return dict(zip(total, means, strict=True)), terms["loss"]
