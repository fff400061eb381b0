"""One loss over the global batch, however many processes share it and however few images fit into memory at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Batch = dict[str, Any]


def parts_of(batch: Batch, size: int | None) -> list[Batch]:
    """Return ``batch`` cut into parts of ``size`` rows, the last one perhaps smaller; None leaves it whole."""
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
    """Return the mean of ``values`` over the processes, which each hold an equal share of the batch."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def world_size() -> int:
    """Return how many processes share the global batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return which of them this one is."""
    return dist.get_rank() if world_size() > 1 else 0


Rows = dict[str, Tensor]
Terms = dict[str, Tensor]


def in_batch_step(
    parts: list[Batch],
    encode: Callable[[Batch, int], Rows],
    shared: Rows,
    terms_of: Callable[[Rows, Rows], Terms],
    backward: Callable[[Tensor], None],
) -> tuple[Terms, Tensor]:
    """Return the terms of a loss that compares all images of the global batch, and what is left to differentiate.

    ``encode(part, i)`` returns the features of a part with their graph, ``terms_of(rows, shared)`` the terms, "loss" among
    them, from the rows (B, D) of the global batch; ``shared`` are tensors that belong to no row. The features come first,
    of several parts without their graphs; the gradients of the loss to them are then carried into each part alone:
    ``backward`` is called for all parts but the last, whose surrogate is returned. Averaged over the processes, as DDP
    does, the gradients are those of one process with the whole batch. Gao et al. 2021 (arXiv 2101.06983), section 3.2.
    """
    alone = len(parts) == 1
    encoded = [encode(part, i) if alone else _without_graph(encode(part, i)) for i, part in enumerate(parts)]
    own = {name: torch.cat([rows[name] for rows in encoded]) for name in encoded[0]}
    leaves = {name: gathered(rows).requires_grad_() for name, rows in own.items()}
    fixed = {name: value.detach().requires_grad_(value.requires_grad) for name, value in shared.items()}
    terms = terms_of(leaves, fixed)
    learned = {name: value for name, value in fixed.items() if value.requires_grad}
    found = torch.autograd.grad(terms["loss"], [*leaves.values(), *learned.values()], allow_unused=True)
    gradients = dict(zip([*leaves, *learned], found, strict=True))
    # DDP's mean divides by the processes, but the rows of one are in no other's gradient; what is shared is in all.
    mine = {name: gradients[name].chunk(world_size())[rank()] * world_size() for name in leaves}
    start = 0
    for i, rows in enumerate(encoded):
        size = len(next(iter(rows.values())))
        if not alone:
            rows = encode(parts[i], i)
        surrogate = torch.stack([(rows[name] * mine[name][start : start + size]).sum() for name in rows]).sum()
        start += size
        if i < len(parts) - 1:
            backward(surrogate)
    for name in learned:
        if gradients[name] is not None:
            surrogate = surrogate + (shared[name] * gradients[name]).sum()
    return {name: term.detach() for name, term in terms.items()}, surrogate


def _without_graph(rows: Rows) -> Rows:
    """Return ``rows`` without the graph behind them. It was built, because layers may round differently without one."""
    return {name: value.detach() for name, value in rows.items()}


def summed_step(
    parts: list[Batch], terms_of: Callable[[Batch, int], Terms], backward: Callable[[Tensor], None]
) -> tuple[Terms, Tensor]:
    """Return the terms of a loss that is a mean over images, and what is left to differentiate: gradients just add up.

    ``terms_of(part, i)`` returns the terms of a part, "loss" among them. The terms returned are means over all processes.
    """
    sizes = [len(next(iter(part.values()))) for part in parts]
    total: Terms = {}
    for i, part in enumerate(parts):
        terms = {name: term * (sizes[i] / sum(sizes)) for name, term in terms_of(part, i).items()}
        total = {name: term.detach() + total.get(name, 0.0) for name, term in terms.items()}
        if i < len(parts) - 1:
            backward(terms["loss"])
    means = averaged(torch.stack(list(total.values())))
    return dict(zip(total, means, strict=True)), terms["loss"]
