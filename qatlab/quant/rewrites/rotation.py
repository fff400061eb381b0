"""Rotation: a rewrite of a transformer without outlier features and with unchanged outputs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qatlab.core.domains import Count, Seed
from qatlab.core.errors import UserError
from qatlab.quant.layers.linear import QuantLayer
from qatlab.quant.quantizers.hadamard import RandomHadamard
from qatlab.towers import timm_eva
from qatlab.towers.rotations import Heads, Hidden, Layer, Rotatable, Stream, Unit, is_rms, rotatable


class ToRotated(nn.Module):
    """Returns R (x - mean(x)) for x (..., width): the features of a rotated residual stream, with the R of ``seed``.

    A LayerNorm ignores the mean of its input, so it gives the same for a stream without a mean. On such a stream it
    equals an RMSNorm, which commutes with every rotation.
    """

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.rotation = RandomHadamard(width, seed)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features rotated, without their mean, in the shape and dtype of x (..., width)."""
        return self.rotation(x - x.mean(dim=-1, keepdim=True))


class FromRotated(nn.Module):
    """Returns R^T x for x (..., width), with the R of ``seed``: the inverse of ToRotated, except for the mean."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        self.rotation = RandomHadamard(width, seed)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features rotated back, in the shape and dtype of x (..., width)."""
        return self.rotation.inverse(x)


@dataclass
class Rotation:
    """Returns a tower of transformer blocks, rewritten in place: the same outputs, but no outliers in layers' inputs.

    Random Hadamard rotations R, drawn from ``seed``, are multiplied into the weights on both sides of their place
    (Ashkboos et al. 2024, "QuaRot", arXiv 2404.00456):

    * ``residual``: the residual stream. The weights and biases of a block's norms go into the layers behind them, which
      leaves RMSNorm; layers that write to the stream, and what goes into the first block (in a text tower the rows of
      its tables), give R (x - mean) in place of x; the norm behind the last block reads x rotated back. A stream that
      only RMSNorms read keeps its mean.
    * ``mlp``: the input of an mlp's last layer. An activation function or a norm lies before it, so this is a transform
      in every forward; R^T goes into the layer.
    * ``heads``: the values inside each head, of pooling attentions too. R goes into the rows that make values, R^T into
      the layer behind the heads.

    Layers keep their names and Parameters (a LayerScale goes into its layer; a layer without a bias gets one where its
    norm has one); folds are computed in float64 and rounded to the weights' dtype. Outputs agree to float rounding;
    outputs of the blocks (``forward_intermediates``) are rotated with ``residual``, unless normalised. Differences from
    QuaRot: any width, no transform across the heads before out_proj, and the last norm stays as it is, because a
    projection behind it may have no bias that could take the norm's bias.

    With ``seeds`` above 1 it stands for that many rotations, drawn from ``seed``, ``seed`` + 1 and so on: ``candidates`` are
    these, of which whoever quantizes the tower keeps the one of least error, and a call is refused.

    Raises UserError, before anything is changed, for a tower without known transformer blocks, for what is quantized or
    rotated already, and for a part that cannot be exact: with ``residual`` norms behind the layers, a norm of the mlp
    behind that of the block, patch merging; with ``heads`` a norm or a gate between the values and out_proj.
    """

    seed: Seed = 0
    residual: bool = True
    mlp: bool = True
    heads: bool = True
    seeds: Count = 1

    def __post_init__(self) -> None:
        if not (self.residual or self.mlp or self.heads):
            raise UserError("residual, mlp and heads of a rotation are all false: set one to true, or leave it out.")

    def prepare(self, visual: nn.Module) -> nn.Module:
        """Return ``visual`` rotated, which is the form that a rewritten state dict loads into and needs no data."""
        return self.candidates()[0](visual)

    def candidates(self) -> list[Rotation]:
        """Return the rotations of which one is to be kept, each of one seed."""
        return [replace(self, seed=self.seed + i, seeds=1) for i in range(self.seeds)]

    @torch.no_grad()
    def __call__(self, visual: nn.Module, batches: Iterable[Tensor] = ()) -> nn.Module:
        """Return ``visual``, rewritten in place; the images ``batches`` (B, 3, S, S) are not read."""
        if self.seeds > 1:
            raise UserError(f"seeds={self.seeds} are so many rotations: call one of candidates(), or give seeds=1.")
        # Everything that may be refused is checked before the first weight changes.
        _require_untouched(visual)
        found = rotatable(visual)
        self._require_exact(visual, found)
        # Blocks share the stream and its rotation; each block has a rotation of its own for the mlp and one for the
        # heads. All seeds are drawn, used or not, so that one option does not change the rotations of another.
        generator = torch.Generator().manual_seed(self.seed)
        stream_seed, *seeds = torch.randint(2**62, (1 + 2 * len(found.units),), generator=generator).tolist()
        if self.residual:
            assert found.stream is not None  # _require_exact has refused towers without a stream
            centred = not is_rms(found.stream.exit.part)
            rotation = RandomHadamard(found.stream.width, stream_seed).to(next(visual.parameters()).device)
            _rotate_ends(found.stream, visual, rotation, centred)
            for unit in found.units:
                _rotate_stream(unit, rotation, centred)
        for unit, mlp_seed, head_seed in zip(found.units, seeds[::2], seeds[1::2], strict=True):
            if self.mlp and unit.hidden is not None:
                _rotate_mlp(unit.hidden, mlp_seed)
            if self.heads and unit.heads is not None:
                _rotate_heads(unit.heads, head_seed)
        # A bias that a layer got is only heeded where the layer is called.
        timm_eva.call_projections(visual)
        return visual

    def rewritten(self, visual: nn.Module) -> set[str]:
        """Return the names of the layers in ``visual``, in full precision, whose inputs a rotation of its parts changes."""
        parts = [part for part in ("residual", "heads", "mlp") if getattr(self, part)]
        return {name for unit in rotatable(visual).units for part in parts for name in unit.readers.get(part, ())}

    def _require_exact(self, visual: nn.Module, found: Rotatable) -> None:
        """Raise UserError where ``visual`` has no blocks, or a part that is asked for cannot be rotated exactly."""
        kind = type(visual).__name__
        if not found.units:
            raise UserError(
                f"{kind} has no transformer blocks of a known form, which a rotation rewrites: leave the rotation out, "
                "and meet outliers with SmoothQuant or with an asymmetric or per-token grid."
            )
        asked = [part for part in ("residual", "heads", "mlp") if getattr(self, part)]
        for unit in found.units:
            for part in asked:
                if part in unit.obstacles:
                    raise UserError(f"'{unit.name}' {unit.obstacles[part]}: set {part}=false.")
        if self.residual and found.stream is None:
            raise UserError(
                f"{kind}'s residual stream cannot be rotated, because {found.obstacle}: set residual=false."
            )
        if self.residual:
            _require_norms_of_one_kind(found)


def _require_untouched(visual: nn.Module) -> None:
    """Raise UserError where a layer of ``visual`` is quantized, or a rotation is part of it."""
    for name, module in visual.named_modules():
        if isinstance(module, (QuantLayer, RandomHadamard)):
            raise UserError(f"'{name}' is quantized or rewritten already: rotate the full-precision model, and first.")


def _require_norms_of_one_kind(found: Rotatable) -> None:
    """Raise UserError unless only LayerNorms, or only RMSNorms, read the residual stream."""
    assert found.stream is not None
    centred = not is_rms(found.stream.exit.part)
    expected = "LayerNorm" if centred else "RMSNorm"
    read = [(unit.name, reads.norm) for unit in found.units for reads in unit.reads]
    for name, norm in [*read, (found.stream.exit.name, found.stream.exit)]:
        if not (isinstance(norm.part, nn.LayerNorm) if centred else is_rms(norm.part)):
            raise UserError(
                f"'{name}' reads the residual stream by {type(norm.part).__name__} and not {expected} (is it rotated "
                "already?): set residual=false."
            )


def _rotate_ends(stream: Stream, visual: nn.Module, rotation: RandomHadamard, centred: bool) -> None:
    """Let what goes into the first block of ``visual`` be rotated, and the norm behind the last block read it rotated back."""
    like = next(visual.parameters())
    kinds = (ToRotated, FromRotated) if centred else (RandomHadamard, FromRotated)
    to_rotated, from_rotated = (kind(stream.width, rotation.seed).to(like) for kind in kinds)
    first, last = stream.entry, stream.exit
    mode = visual.training
    if first is not None:
        first.put(nn.Sequential(OrderedDict(norm=first.part, rotation=to_rotated)).train(mode))
    last.put(nn.Sequential(OrderedDict(rotation=from_rotated, norm=last.part)).train(mode))
    for token in stream.tokens:
        token.copy_(rotation(_centred(token.double(), centred)))


def _rotate_stream(unit: Unit, rotation: RandomHadamard, centred: bool) -> None:
    """Rewrite the weights of ``unit`` so that it reads from the rotated stream and writes to it."""
    for reads in unit.reads:
        norm = reads.norm.part
        for layer in reads.layers:
            _absorb(norm, layer)
            # W x = (W R^T) (R x), and W R^T is computed by applying R to the rows of W.
            layer.weight.copy_(rotation(layer.weight.double()))
        # On a stream without a mean an RMSNorm computes what the LayerNorm did without its affine part.
        shape = tuple(norm.normalized_shape)
        reads.norm.put(nn.RMSNorm(shape, eps=norm.eps, elementwise_affine=False).train(norm.training))
    for writes in unit.writes:
        gamma = writes.gamma
        for tensor in writes.layer.tensors:
            # A weight becomes (in_features, out_features) and a bias
            # (1, out_features), so that the outputs are rotated.
            rows = torch.atleast_2d(tensor.double().t())
            # A LayerScale multiplies the output of its layer feature by feature, so it must act before the rotation.
            if gamma is not None:
                rows = rows * gamma.double()
            tensor.copy_(rotation(_centred(rows, centred)).t().reshape(tensor.shape))
        writes.drop_scale()


def _centred(rows: Tensor, centred: bool) -> Tensor:
    """Return ``rows`` (..., width), without their mean where the stream has none.

    The LayerNorm that read the rows removed their mean, and the RMSNorm in its place does not.
    """
    return rows - rows.mean(dim=-1, keepdim=True) if centred else rows


def _absorb(norm: Any, layer: Layer) -> None:
    """Move the affine part of ``norm`` into the weight (out, in) and bias (out,) of the ``layer`` that reads it."""
    gain, shift = norm.weight, getattr(norm, "bias", None)
    if shift is not None:
        bias = layer.biased()
        bias.copy_(bias.double() + layer.weight.double() @ shift.double())
    if gain is not None:
        layer.weight.copy_(layer.weight.double() * gain.double())


def _rotate_mlp(hidden: Hidden, seed: int) -> None:
    """Put a rotation before an mlp's last layer in every forward, and its inverse into the weight of that layer."""
    slot, weight = hidden.slot, hidden.weight
    rotation = RandomHadamard(weight.shape[1], seed).to(weight).train(slot.owner.training)
    weight.copy_(rotation(weight.double()))
    if isinstance(slot.owner, nn.Sequential):
        slot.put_before("rotation", rotation)
    elif isinstance(slot.part, nn.Identity):
        slot.put(rotation)
    else:
        slot.put(nn.Sequential(OrderedDict(before=slot.part, rotation=rotation)).train(slot.owner.training))


def _rotate_heads(heads: Heads, seed: int) -> None:
    """Rotate the values of each head inside the layer that makes them, and back inside the layer after the heads."""
    rotation = RandomHadamard(heads.width, seed).to(heads.out.device)
    # Attention takes weighted means of values, which commute with R. All heads have the same R, so that
    # heads may share their values.
    for values in heads.values:
        rows = values.double().reshape(-1, rotation.width, values[0].numel()).transpose(1, 2)
        values.copy_(rotation(rows).transpose(1, 2).reshape(values.shape))
    heads.out.copy_(rotation(heads.out.double().unflatten(1, (-1, heads.width))).flatten(1))
