"""Registers: keys and values that an attention finds beside those of its tokens, the same for every image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Registers(nn.Module):
    """Returns keys and values with those of n registers behind them, and the mask that weighs the registers.

    ``keys`` and ``values`` are (width, n), the heads' channels one after the other, as the rows of the weights that make them.
    ``log_count`` (n,) is added to the logits of a register: the logarithm of how many tokens it stands for. Without
    registers nothing changes. Of a state dict all three are taken as they are, whatever n; other widths are refused.
    """

    keys: Tensor
    values: Tensor
    log_count: Tensor

    def __init__(self, keys: Tensor, values: Tensor, log_count: Tensor) -> None:
        super().__init__()
        self.register_buffer("keys", keys)
        self.register_buffer("values", values)
        self.register_buffer("log_count", log_count)

    def __len__(self) -> int:
        return len(self.log_count)

    def forward(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (k, v, mask) with registers: (B, heads, L + n, d / heads) twice, and what is added to logits (..., L + n).

        ``mask`` is what is added to the logits (..., L) of the tokens, None where that is nothing.
        """
        if not len(self):
            return k, v, mask
        heads, tokens = k.shape[1], k.shape[2]
        k, v = (
            torch.cat([of_tokens, own.unflatten(0, (heads, -1)).mT.expand(len(k), -1, -1, -1)], dim=2)
            for of_tokens, own in ((k, self.keys.to(k.dtype)), (v, self.values.to(v.dtype)))
        )
        own = self.log_count.to(k.dtype)
        if mask is None:
            return k, v, F.pad(own, (tokens, 0)).expand(1, 1, 1, -1)
        return k, v, torch.cat([mask, own.expand(*mask.shape[:-1], -1)], dim=-1)

    def extra_repr(self) -> str:
        """Return the number of registers shown by ``print(model)``."""
        return f"registers={len(self)}"

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        *_, errors = rest
        names = [f"{prefix}{name}" for name in ("keys", "values", "log_count")]
        if all(name in state for name in names):
            keys, values, log_count = (state[name] for name in names)
            shape = (self.keys.shape[0], log_count.numel())
            if not keys.shape == values.shape == shape or log_count.ndim != 1:
                errors.append(
                    f"{prefix}keys, values and log_count are {tuple(keys.shape)}, {tuple(values.shape)} and "
                    f"{tuple(log_count.shape)}: expected ({shape[0]}, n) twice and (n,)."
                )
                return
            # How many there are is found on images, so that the module of the options alone has none.
            self.keys, self.values = self.keys.new_empty(shape), self.values.new_empty(shape)
            self.log_count = self.log_count.new_empty(log_count.shape)
        super()._load_from_state_dict(state, prefix, *rest)


def no_registers(width: int, like: Tensor) -> Registers:
    """Return Registers without any, for an attention of ``width`` channels, on the device and in the dtype of ``like``."""
    return Registers(like.new_empty(width, 0), like.new_empty(width, 0), like.new_empty(0))
