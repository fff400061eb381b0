"""RaanA: weights as codes of 1 to 8 bits in a randomly rotated basis."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from qatlab.core.domains import Between, OneOf, Seed, checked
from qatlab.core.errors import UserError
from qatlab.quant.quantizers.base import Quantizer, Statistics
from qatlab.quant.quantizers.hadamard import RandomHadamard
from qatlab.quant.quantizers.observers import WeightStatistics
from qatlab.quant.quantizers.rabitq import pieces, rabitq_levels


class RaanA(Quantizer):
    """Returns mu + R^T (s y), a constant twin of the weight, from codes y in a rotated basis.

    With mu the mean over the output channels, R a randomized Hadamard rotation of the inputs and w = R (W - mu) for
    each output channel, y is the vector of half-integers of least angle to w (``rabitq_levels``) and s its step:
    "unbiased" takes s = |w|^2 / <y, w>, so that <s y, w> = |w|^2; "least_squares" takes <y, w> / |y|^2, of smaller
    error (by 36 % at 1 bit, 12 % at 2, nothing at 8). ``centralize=False`` leaves mu at 0; the ``kept`` fraction of
    output channels, those of largest |W - mu|, rounded down, keeps full precision (Yang et al. 2025, arXiv 2504.03717).

    ``bits`` is 1 to 8, ``channels`` the output channels, ``width`` the weights of each (any number). The twin is in the
    weight's own basis, so any activation quantizer goes with it; a deployed model would apply the rotation to x and add
    x . mu to each output. Therefore a row of the twin holds more than 2^bits values, and ``codes`` cannot be multiplied
    with those of x.

    Nothing is learned and the weight is frozen: it gets no gradient, and the twin stays that of the weight seen in
    ``observe``, whatever weight the forward is given. The state dict holds everything that makes the twin: ``levels``
    (uint8, y + (2^bits - 1) / 2), ``step``, ``mean``, the signs of R and the kept channels.

    Raises UserError for bits, kept or rescale out of range, for activations, and for a weight of another shape.
    """

    smallest_bits = 1
    levels: Tensor
    step: Tensor
    mean: Tensor
    kept_channels: Tensor
    kept_weight: Tensor

    @checked
    def __init__(
        self,
        bits: Annotated[int, Between(1, 8)],
        *,
        channels: int,
        width: int,
        batched: bool = False,
        seed: Seed = 0,
        rescale: Annotated[str, OneOf("unbiased", "least_squares")] = "unbiased",
        centralize: bool = True,
        kept: Annotated[float, Between(0, 1, below=True)] = 0.003,
    ) -> None:
        if batched:
            raise UserError("RaanA quantizes weights and no activations: choose another quant/act=, such as minmax.")
        super().__init__(bits, channels=channels, batched=False, per_channel=True)
        self.width = width
        # Codes are stored as levels from 0; a level minus half of qmax is the half-integer y.
        self.qmin, self.qmax = 0, 2**bits - 1
        self.rescale, self.centralize, self.kept = rescale, centralize, kept
        self.rotation = RandomHadamard(width, seed)
        self.register_buffer("levels", torch.zeros(channels, width, dtype=torch.uint8))
        self.register_buffer("step", self._empty_scale())
        self.register_buffer("mean", torch.zeros(width))
        # The count is rounded down, and 1e-9 is added because in floats 0.29 * 100 is 28.999999999999996.
        count = int(kept * channels + 1e-9)
        self.register_buffer("kept_channels", torch.zeros(count, dtype=torch.int64))
        self.register_buffer("kept_weight", torch.zeros(count, width))

    @property
    def scale(self) -> Tensor:
        """The step s of each output channel's codes in the rotated basis, (channels, 1); 0 for a row of zeros."""
        return self.step

    @property
    def integer_product(self) -> bool:
        """False, because the codes belong to the rotated input and not to the layer's input."""
        return False

    def observe(self, x: Tensor) -> None:
        """Remember the weight x (channels, ...) for ``fit``.

        Raises UserError on NaN or infinite values, and where a row has not ``width`` elements.
        """
        self._require_shape(x)
        self._statistics = WeightStatistics(x.detach().reshape(self.channels, -1), self.step.shape)

    @torch.no_grad()
    def start_from(self, statistics: Statistics) -> None:
        """Set the codes, the steps, the mean and the kept channels from the observed weight."""
        assert isinstance(statistics, WeightStatistics)
        weight = statistics.rows.float()
        if self.centralize:
            self.mean.copy_(weight.mean(0, dtype=torch.float64))
        rows = weight - self.mean
        self.kept_channels.copy_(rows.norm(dim=1).topk(len(self.kept_channels)).indices.sort().values)
        self.kept_weight.copy_(weight[self.kept_channels])
        # Rows of kept channels are set to zero, so that they get the step 0 and need no search for codes.
        rows[self.kept_channels] = 0
        rows = self.rotation(rows)
        self.levels.copy_(rabitq_levels(rows, self.bits))
        self.step.copy_(self._step_of(rows))

    def forward(self, x: Tensor) -> Tensor:
        """Return the twin of the weight x (channels, ...), in its shape and dtype; UserError before calibration."""
        if not self._ready:
            self._require_scale()
        self._require_shape(x)
        return _Constant.apply(x, self._twin().view(x.shape).to(x.dtype))

    def codes(self, x: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
        """Raise UserError for any x (channels, ...): the codes belong to the rotated input, not to the layer's."""
        raise UserError(
            "RaanA's codes are those of a rotated weight and cannot be multiplied with the codes of the input: set "
            "quant.matmul=float."
        )

    def grid_rows(self, quantized: Tensor) -> Tensor:
        """Return the codes of the channels that are not kept, int16 (n, width), or ``quantized`` as (channels, width).

        Codes are returned where ``quantized`` (channels, ...) equals exactly the twin of these codes.
        """
        # ``verify`` counts the distinct values of a row. A row of the twin holds many
        # more than 2^bits values after the inverse rotation, so its codes are counted
        # instead. A tensor that is not the twin is counted as it is, and fails.
        rows = quantized.detach().reshape(self.channels, -1)
        if not torch.equal(rows, self._twin().to(rows.dtype)):
            return rows
        coded = torch.ones(self.channels, dtype=torch.bool, device=rows.device)
        coded[self.kept_channels] = False
        return self.levels[coded].to(torch.int16)

    def extra_repr(self) -> str:
        """Return the options shown by ``print(model)``."""
        return f"bits={self.bits}, rescale={self.rescale}, centralize={self.centralize}, kept={self.kept}"

    def _half_integers(self, levels: Tensor) -> Tensor:
        """Return y (n, width), in the dtype of the steps, for ``levels`` (n, width)."""
        return levels.to(self.step.dtype) - self.qmax / 2

    def _step_of(self, rows: Tensor) -> Tensor:
        """Return the steps (channels, 1), float64, of the rotated ``rows`` (channels, width) with the stored codes."""
        steps = []
        for piece in pieces(*rows.shape):
            y, x = self._half_integers(self.levels[piece]).double(), rows[piece].double()
            inner, square = torch.linalg.vecdot(x, y), torch.linalg.vecdot(x, x)
            step = square / inner if self.rescale == "unbiased" else inner / torch.linalg.vecdot(y, y)
            # A row of zeros gives 0 / 0, and its step is set to 0.
            steps.append(torch.where(square > 0, step, 0))
        return torch.cat(steps).unsqueeze(1)

    def _twin(self) -> Tensor:
        """Return mu + R^T (s y), (channels, width), with the kept channels in full precision."""
        twin = self.rotation.inverse(self._half_integers(self.levels) * self.step) + self.mean
        twin[self.kept_channels] = self.kept_weight
        return twin

    def _require_shape(self, x: Tensor) -> None:
        if len(x) != self.channels or x.numel() != self.channels * self.width:
            raise UserError(
                f"RaanA was made for {self.channels} output channels of {self.width} weights and got a weight of shape "
                f"{tuple(x.shape)}."
            )


class _Constant(torch.autograd.Function):
    """The twin in the weight's place: part of the graph, but without a gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, twin: Tensor) -> Tensor:
        """Return ``twin`` as it is."""
        return twin

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        """Return no gradient, whatever ``grad`` is like."""
        return None, None
