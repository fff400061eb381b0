"""The weight that a layer multiplies with: rounded anew, or reused from an earlier forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qatlab.quant.quantizers.base import Quantizer


class Kept:
    """Tensors that were computed from a state, kept for as long as the state's ``key`` is the same."""

    def __init__(self) -> None:
        self._key: Any = None
        self._tensors: dict[Any, Tensor] = {}

    def __len__(self) -> int:
        return len(self._tensors)

    def get(self, key: Any, what: Any, compute: Callable[[], Tensor]) -> Tensor:
        """Return ``what`` of the state ``key``, a tensor of any shape: ``compute()``, or its result from before."""
        # Only one state is kept, because tensors of an older state would only take memory.
        if self._key != key:
            self._key, self._tensors = key, {}
        if what not in self._tensors:
            self._tensors[what] = compute()
        return self._tensors[what]

    def clear(self) -> None:
        """Forget everything that is kept."""
        self._key, self._tensors = None, {}


class FoldedWeight:
    """The ``weight`` (out, in, ...) of a layer and its ``quantizer``, None where the weight stays as it is.

    A quantized weight is kept and reused where it needs no gradient: where the weight is frozen, or where the layer is
    not in ``training`` and gradients are off. A kept weight is bit-equal to one that is computed anew, and as large as
    the weight. It is used until the weight or the quantizer's state changes; torch counts the changes of each tensor,
    except writes in place through ``.data``. A layer makes a FoldedWeight in every forward, from what the layer has
    ``kept``.
    """

    def __init__(self, weight: Tensor, quantizer: Quantizer | None, training: bool, kept: Kept) -> None:
        self.weight, self.quantizer, self.training = weight, quantizer, training
        self._kept = kept

    @property
    def frozen(self) -> bool:
        """Whether neither the weight nor a parameter of its quantizer is trained."""
        learned = [] if self.quantizer is None else self.quantizer.parameters()
        return not any(tensor.requires_grad for tensor in (self.weight, *learned))

    def value(self) -> Tensor:
        """Return the factor of the forward, (out, in, ...): the fake-quantized weight, or the weight as it is."""
        quantizer = self.quantizer
        return self.weight if quantizer is None else self._reused(quantizer, "value", lambda: quantizer(self.weight))

    def codes(self, dtype: torch.dtype) -> Tensor:
        """Return the integer codes of the weight in ``dtype``, (out, in, ...)."""
        quantizer = self.quantizer
        assert quantizer is not None
        return self._reused(quantizer, dtype, lambda: quantizer.codes(self.weight, dtype))

    def _reused(self, quantizer: Quantizer, what: Any, compute: Callable[[], Tensor]) -> Tensor:
        learning = self.training or torch.is_grad_enabled()
        # torch counts no versions of a tensor that was made in
        # inference mode, so a change of such a weight would be missed.
        if (learning and not self.frozen) or self.weight.is_inference():
            return compute()
        state = [self.weight, *quantizer.parameters(), *quantizer.buffers()]
        # A new tensor has another address, and a write in place gives another version. Inference mode is part of the
        # key, because a tensor that was made in inference mode cannot be used in training.
        key = [torch.is_inference_mode_enabled(), *((tensor.data_ptr(), tensor._version) for tensor in state)]
        return self._kept.get(key, what, compute)
