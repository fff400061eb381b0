"""An encoder with bitsandbytes' linear layers: what arXiv 2509.21173 (Table 3) found slower than full precision."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import nn

from qatlab.core.extras import require
from qatlab.quant import MinMax, quantize
from qatlab.quant.layers.walk import quant_layers

KINDS = ("bnb_int8", "bnb_nf4")


def replaced(visual: nn.Module, kind: str) -> nn.Module:
    """Return a copy of a full-precision encoder whose linear layers are bitsandbytes', ``kind`` one of KINDS.

    bnb_int8 is LLM.int8 (Dettmers et al. 2022) with its outlier threshold of 6, bnb_nf4 has weights in NF4 (Dettmers et
    al. 2023). Weights are rounded where the copy is moved to a device. Raises UserError without bitsandbytes.
    """
    bnb = require("bitsandbytes", extra="bench")
    # torch's attention multiplies with its projections' weights and calls no layer that could be replaced. The conversion
    # of quantize() puts layers there; its quantizers go with the layers that bitsandbytes' take the place of.
    model = quantize(copy.deepcopy(visual), partial(MinMax, 8), partial(MinMax, 8))
    for name, layer in quant_layers(model).items():
        owner, _, attribute = name.rpartition(".")
        shape = layer.in_features, layer.out_features
        weight = layer.weight.detach()
        made: Any  # bitsandbytes has no types
        if kind == "bnb_int8":
            made = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
            made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(*shape, quant_type="nf4", compute_dtype=weight.dtype)
            made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        made.bias = layer.bias
        setattr(model.get_submodule(owner), attribute, made)
    return model.eval()
