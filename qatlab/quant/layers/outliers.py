"""The channels of a layer's input that stay in full precision, with their columns of the weight: a small product beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OutlierProduct(nn.Module):
    """Returns x[..., channels] weight^T, (..., out) for x (..., in): what some input channels add to a layer's output.

    ``channels`` (k,) int64 are the places of the channels, ``weight`` (out, k) their columns of the layer's weight, which
    has zeros there (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339, with channels that are chosen once). Without
    channels nothing is added. Of a state dict both are taken as they are, whatever their number; channels that are out of
    range or named twice are refused. ``trained`` says whether the columns learn, as the layer's weight does.
    """

    channels: Tensor

    def __init__(self, inputs: int, channels: Tensor, weight: Tensor, trained: bool) -> None:
        super().__init__()
        self.inputs, self.trained = inputs, trained
        self.register_buffer("channels", channels)
        self._put(weight)

    def __len__(self) -> int:
        return len(self.channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the channels of x (..., in) add to the output, (..., out)."""
        return F.linear(x.index_select(-1, self.channels), self.weight)

    def without(self, x: Tensor) -> Tensor:
        """Return x (..., in) with zeros in the channels."""
        return x.index_fill(-1, self.channels, 0)

    def extra_repr(self) -> str:
        """Return the number of channels shown by ``print(model)``."""
        return f"channels={len(self)} of {self.inputs}"

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        *_, errors = rest
        found = state.get(f"{prefix}channels")
        if found is not None:
            if wrong := _wrong(found, self.inputs):
                errors.append(f"{prefix}channels {wrong}")
                return
            # The number of channels is found on images, so that the module of the options alone has none.
            self.channels = self.channels.new_empty(found.shape)
            if self.weight.shape[1] != len(found):
                self._put(self.weight.detach().new_empty(len(self.weight), len(found)))
        super()._load_from_state_dict(state, prefix, *rest)

    def _put(self, weight: Tensor) -> None:
        """Make ``weight`` (out, k) the columns."""
        # Without channels the forward does not run, and several processes wait for the gradient of all that is trained.
        self.weight = nn.Parameter(weight, requires_grad=self.trained and weight.shape[1] > 0)


def no_outliers(inputs: int, weight: Tensor) -> OutlierProduct:
    """Return the OutlierProduct without channels of a layer of ``inputs`` channels, beside its ``weight`` (out, in)."""
    return outliers_of(inputs, torch.empty(0, dtype=torch.int64), weight)


def outliers_of(inputs: int, channels: Tensor, weight: Tensor) -> OutlierProduct:
    """Return the OutlierProduct of ``channels`` (k,) int64, with a copy of their columns of ``weight`` (out, in)."""
    channels = channels.to(weight.device)
    return OutlierProduct(inputs, channels, weight.detach()[:, channels].clone(), weight.requires_grad)


def _wrong(channels: Tensor, inputs: int) -> str:
    """Return what is wrong with stored ``channels`` of a layer of ``inputs`` channels, "" where nothing is."""
    if channels.dtype != torch.int64 or channels.ndim != 1:
        return f"are {channels.dtype} of {channels.ndim} dimensions: expected int64 of one."
    if len(channels) and not 0 <= int(channels.min()) <= int(channels.max()) < inputs:
        return (
            f"go from {int(channels.min())} to {int(channels.max())}, and the layer has those from 0 to {inputs - 1}."
        )
    if len(channels.unique()) < len(channels):
        return "name a channel twice: each can be left out of the rounding once."
    return ""
